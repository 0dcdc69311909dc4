"""The variant with NVIDIA's driver: what of Debian's packages gets into an image, and where."""

from pathlib import Path

import pytest

from images import builder
from images.kernel import KernelKind
from images.nvidia import driver as nvidia
from images.nvidia import modules
from images.packages import Fetched
from images.store import ImageStore
from images.variant import Driver, Variant
from rpc.errors import FailedPrecondition, InvalidArgument
from tests.unit.images.fakes import agent_source, kernel_tree, module, python_tree

VERSION = "550.1.2"


def packages(tree: Path) -> Path:
    """As Debian's packages have it: libraries in a directory of the driver's or where the loader finds them,
    links beside each; programs likewise."""
    libraries = tree / nvidia.LIBRARIES
    own = libraries / "nvidia/current"
    own.mkdir(parents=True)
    for directory, name in ((own, "libcuda"), (libraries, "libnvidia-nvvm")):
        (directory / f"{name}.so.{VERSION}").write_text(name)
        (directory / f"{name}.so.1").symlink_to(f"{name}.so.{VERSION}")
    (own / "libcuda.so").symlink_to("libcuda.so.1")
    (own / "nvidia-drm_gbm.so").symlink_to(f"libcuda.so.{VERSION}")  # of graphics, which a guest has not
    (libraries / "libc.so.6").write_text("another's")
    for place, name in (
        ("usr/lib/nvidia/current", "nvidia-smi"),
        ("usr/lib/nvidia/current", "nvidia-debugdump"),
        ("usr/bin", "nvidia-persistenced"),
        ("usr/bin", "nvidia-modprobe"),
        ("usr/bin", "nvidia-cuda-mps-control"),
        ("usr/sbin", "nvidia-cuda-mps-server"),
        ("usr/sbin", "ldconfig"),
    ):
        path = tree / place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        path.chmod(0o4755)
    firmware = tree / nvidia.FIRMWARE / VERSION
    firmware.mkdir(parents=True)
    (firmware / "gsp_ga10x.bin").write_text("firmware")
    (tree / "etc/OpenCL/vendors").mkdir(parents=True)
    (tree / nvidia.OPENCL).write_text("libnvidia-opencl.so.1\n")
    return tree


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    files = []
    for name, depends in (("nvidia", ""), ("nvidia-uvm", "nvidia"), ("nvidia-modeset", "nvidia")):
        files.append(tmp_path / f"{name}.ko")
        files[-1].write_bytes(module(depends))
    packages(tmp_path / "packages")
    (tmp_path / "cache").symlink_to("packages")
    return Driver(VERSION, tuple(files), tmp_path / "cache", {"libcuda1": "550.1.2-3"})


def test_it_lies_where_nvidias_own_installer_puts_it(driver: Driver, tmp_path: Path) -> None:
    root = tmp_path / "root"
    nvidia.add(driver, root)
    libraries = root / nvidia.LIBRARIES
    assert {path.name for path in libraries.iterdir()} == {
        *("libcuda.so", "libcuda.so.1", f"libcuda.so.{VERSION}"),
        *("libnvidia-nvvm.so.1", f"libnvidia-nvvm.so.{VERSION}"),
    }
    assert (libraries / "libcuda.so").readlink() == Path("libcuda.so.1")
    assert (libraries / "libcuda.so").read_text() == "libcuda"
    assert (root / "usr/bin/nvidia-smi").stat().st_mode & 0o7777 == 0o755
    assert (root / "usr/bin/ldconfig").is_file()
    assert (root / "usr/lib/firmware/nvidia" / VERSION / "gsp_ga10x.bin").read_text() == "firmware"


def test_a_program_that_debian_does_not_have_is_named(driver: Driver, tmp_path: Path) -> None:
    (driver.tree / "usr/lib/nvidia/current/nvidia-smi").unlink()
    with pytest.raises(FailedPrecondition, match=r"550\.1\.2 has no nvidia-smi"):
        nvidia.add(driver, tmp_path / "root")


def test_the_variant_has_the_driver_and_says_so(driver: Driver, tmp_path: Path, store: ImageStore) -> None:
    tree = tmp_path / "tree"
    python_tree(tree)
    kernel_tree(tree, {"drivers/virtio_blk": "", "fs/erofs": ""})
    fetched = Fetched(tree, {"crun": "1.2"})
    options = builder.Options(variant=Variant.NVIDIA, source=agent_source(tmp_path / "source"))
    (tmp_path / "work").mkdir()
    files, about = builder.assemble(fetched, fetched, options, tmp_path / "work", driver=driver)
    assert (about["variant"], about["driver"]) == ("nvidia", VERSION)
    assert about["driver_packages"] == {"libcuda1": "550.1.2-3"}
    assert "nvidia" in about["features"]
    listed = (tmp_path / "work/root/usr/lib/casemate/modules.txt").read_text()
    paths = [f"/usr/lib/modules/{name}.ko" for name in ("nvidia", "nvidia_uvm", "nvidia_modeset")]
    assert f"nvidia: {' '.join(paths)}\n" in listed
    assert all((tmp_path / f"work/root{path}").is_file() for path in paths)
    image = store.add(options.stored_as, files, about)
    assert image.name == "default-nvidia"
    assert builder.current(store, options) == image
    assert builder.current(store, builder.Options(source=options.source)) is None


def test_another_image_has_no_driver(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    python_tree(tree)
    kernel_tree(tree, {"drivers/virtio_blk": "", "fs/erofs": ""})
    fetched = Fetched(tree, {})
    options = builder.Options(source=agent_source(tmp_path / "source"))
    (tmp_path / "work").mkdir()
    _, about = builder.assemble(fetched, fetched, options, tmp_path / "work")
    assert not {"variant", "driver", "driver_packages"} & about.keys()
    assert "nvidia" not in about["features"]


def test_its_kernel_is_the_clouds(tmp_path: Path, store: ImageStore) -> None:
    options = builder.Options(variant=Variant.NVIDIA, kernel=KernelKind.TUNED)
    with pytest.raises(InvalidArgument, match="built for the cloud kernel alone"):
        builder.build(store, options, tmp_path / "cache")


def test_modules_are_of_one_source(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="expected one source"):
        modules.version_of(Fetched(tmp_path, {}))
    (tmp_path / f"usr/src/nvidia-current-open-{VERSION}").mkdir(parents=True)
    assert modules.version_of(Fetched(tmp_path, {})) == VERSION


def test_nothing_of_a_build_is_in_its_recipe_but_what_changes_the_modules() -> None:
    script = modules.commands("6.12-cloud", VERSION)
    assert f"nvidia-current-open-{VERSION}" in script
    assert "KERNEL_UNAME=6.12-cloud" in script
    assert "KBUILD_BUILD_HOST=casemate" in script
