"""What the hook does to a container's root, run on a directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent import cdihook


def test_links_are_made_and_wrong_ones_replaced(tmp_path: Path) -> None:
    there, file = tmp_path / "usr/lib/libcuda.so.1", tmp_path / "usr/lib/libcuda.so"
    cdihook.make_link("libcuda.so.550", str(there))
    assert os.readlink(there) == "libcuda.so.550"
    cdihook.make_link("libcuda.so.560", str(there))
    cdihook.make_link("libcuda.so.560", str(there))
    assert os.readlink(there) == "libcuda.so.560"
    file.write_text("the image's own")
    cdihook.make_link("libcuda.so.1", str(file))
    assert file.read_text() == "the image's own"


@pytest.mark.parametrize(
    ("names", "newer"),
    [
        (("libcuda.so.560.35.05", "libcuda.so.1"), True),
        (("libcuda.so.550.54.15",), False),
        (("libcuda.so.535.1",), False),
        (("libcuda.so.1", "README"), False),
    ],
)
def test_an_images_libcuda_goes_first_if_it_is_of_a_later_version(
    tmp_path: Path, names: tuple[str, ...], newer: bool
) -> None:
    for name in names:
        (tmp_path / name).touch()
    directory = str(tmp_path)
    assert cdihook.compat_folders("550.163.01", directory) == ([directory] if newer else [])
    assert cdihook.compat_folders("550.163.01", f"{directory}/none") == []


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot is root's")
def test_no_link_of_the_containers_leads_out_of_its_root(tmp_path: Path) -> None:
    """The container's /usr/lib is a link to a directory of the guest's."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory in (root / "usr", root / "etc", outside):
        directory.mkdir(parents=True)
    (root / "usr/lib").symlink_to(outside)
    (root / f".{outside}").mkdir(parents=True)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from agent import cdihook; "
        "cdihook.LDCONFIG = '/usr/bin/true'; cdihook.main(sys.argv[2:])"
    )
    source = str(Path(cdihook.__file__).parent.parent)
    words = [
        f"--root={root}",
        "--driver=550.1",
        "--folder=/usr/lib",
        "--link=libcuda.so.1::/usr/lib/libcuda.so",
    ]
    subprocess.run([sys.executable, "-c", code, source, *words], check=False)
    assert list(outside.iterdir()) == []
    assert os.readlink(root / f".{outside}/libcuda.so") == "libcuda.so.1"
    assert (root / "etc/ld.so.conf.d/00-casemate.conf").read_text() == "/usr/lib\n"
