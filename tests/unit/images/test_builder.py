"""The whole composition, from trees made by code: reproducible, and true to its manifest."""

import shutil
from pathlib import Path

import pytest

from images import builder
from images.image import INITRD, KERNEL, ROOTFS, sha256_of
from images.kernel import KernelKind
from images.packages import Fetched
from images.store import ImageStore
from rpc.errors import FailedPrecondition, NotFound
from tests.unit.images.fakes import RELEASE, agent_source, elf, kernel_tree, python_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    path = tmp_path_factory.mktemp("tree")
    python_tree(path)
    modules = {"drivers/virtio_blk": "", "fs/erofs": "lib", "lib/lib": "", "net/virtio_net": ""}
    kernel_tree(path, modules, ("drivers/virtio_console",))
    return Fetched(path, {"crun": "1.2"})


def assemble(tree: Fetched, source: Path, scratch: Path) -> tuple[dict[str, str], dict[str, object]]:
    scratch.mkdir()
    files, about = builder.assemble(tree, tree, builder.Options(source=source), scratch)
    digests = {name: sha256_of(path) for name, path in files.items()}
    shutil.rmtree(scratch)
    return digests, about


def test_the_same_inputs_give_the_same_image(tree: Fetched, tmp_path: Path) -> None:
    source = agent_source(tmp_path / "source")
    first = assemble(tree, source, tmp_path / "one")
    second = assemble(tree, source, tmp_path / "a-directory-with-a-longer-name")
    assert first == second
    assert set(first[0]) == {KERNEL, INITRD, ROOTFS}


def test_another_agent_gives_another_root_and_nothing_else(tree: Fetched, tmp_path: Path) -> None:
    first = assemble(tree, agent_source(tmp_path / "a", "print(1)"), tmp_path / "one")
    second = assemble(tree, agent_source(tmp_path / "b", "print(2)"), tmp_path / "two")
    assert {name for name in first[0] if first[0][name] != second[0][name]} == {ROOTFS}
    assert first[1]["agent"] != second[1]["agent"]


def test_the_manifest_tells_what_it_is_made_of(tree: Fetched, tmp_path: Path) -> None:
    _, about = assemble(tree, agent_source(tmp_path / "source"), tmp_path / "one")
    assert about["kernel"] == RELEASE
    assert about["packages"] == {"crun": "1.2"}
    assert about["suite"] == "trixie"
    assert "no_timer_check" in str(about["cmdline"])


def test_the_guests_crun_is_the_one_that_was_built_for_it(tree: Fetched, tmp_path: Path) -> None:
    static = tmp_path / "built"
    (static / "usr/bin").mkdir(parents=True)
    (static / "usr/bin/crun").write_bytes(elf() + b"static")
    source = agent_source(tmp_path / "source")
    for crun, said in ((static, "static"), (None, "debian")):
        work = tmp_path / said
        work.mkdir()
        _, about = builder.assemble(tree, tree, builder.Options(source=source), work, static=crun)
        wanted = (crun or tree.path) / "usr/bin/crun"
        assert (work / "root/usr/bin/crun").read_bytes() == wanted.read_bytes()
        assert about["crun"] == said


def test_a_crun_that_cannot_be_built_is_debians(
    tree: Fetched, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a network and with nothing in the cache."""
    options = builder.Options(mirror=f"file://{tmp_path}/no-mirror")
    assert builder.own_crun(tree, options, tmp_path / "cache", lambda _: None) is None
    assert "the guest gets Debian's crun" in caplog.text
    assert "no-mirror" in caplog.text


def tuned_tree(tree: Path) -> Fetched:
    """A kernel that was built from its source: an ELF file, and a list of what is built in."""
    modules = tree / "usr/lib/modules/6.12-casemate"
    for directory in (tree / "boot", modules):
        directory.mkdir(parents=True)
    (tree / "boot/vmlinux-6.12-casemate").write_bytes(elf())
    (modules / "modules.builtin").write_text("kernel/drivers/block/virtio_blk.ko\nkernel/fs/erofs/erofs.ko\n")
    return Fetched(tree, {"linux-source-6.12": "6.12-1"})


def test_a_tuned_image_has_no_initramfs_and_its_kernel_mounts_the_root(tree: Fetched, tmp_path: Path) -> None:
    options = builder.Options(kernel=KernelKind.TUNED, source=agent_source(tmp_path / "source"))
    (tmp_path / "work").mkdir()
    files, about = builder.assemble(tree, tuned_tree(tmp_path / "kernel"), options, tmp_path / "work")
    assert set(files) == {KERNEL, ROOTFS}
    assert {"root=/dev/vda", "rootfstype=erofs", "ro", "no_timer_check"} <= set(about["cmdline"].split())
    init = Path(about["cmdline"].partition(" init=")[2].split()[0])
    program = tmp_path / "work/root" / init.relative_to("/")
    assert program.read_bytes().startswith(b"\x7fELF")
    assert program.stat().st_mode & 0o111 == 0o111
    assert (about["kernel"], about["kernel_kind"]) == ("6.12-casemate", "tuned")
    assert about["kernel_packages"] == {"linux-source-6.12": "6.12-1"}


def test_a_kernel_without_what_the_root_needs_is_refused(tree: Fetched, tmp_path: Path) -> None:
    options = builder.Options(kernel=KernelKind.TUNED, source=agent_source(tmp_path / "source"))
    kernel = tuned_tree(tmp_path / "kernel")
    (listed,) = kernel.path.rglob("modules.builtin")
    listed.write_text("kernel/drivers/block/virtio_blk.ko\n")
    (tmp_path / "work").mkdir()
    with pytest.raises(FailedPrecondition, match="no module erofs"):
        builder.assemble(tree, kernel, options, tmp_path / "work")


def test_a_rebuild_keeps_the_kernel_that_was_chosen(tree: Fetched, tmp_path: Path, store: ImageStore) -> None:
    source = agent_source(tmp_path / "source")
    (tmp_path / "work").mkdir()
    tuned = builder.Options(kernel=KernelKind.TUNED, source=source)
    kernel = tuned_tree(tmp_path / "kernel")
    image = store.add("default", *builder.assemble(tree, kernel, tuned, tmp_path / "work"))
    assert builder.current(store, builder.Options(source=source)) == image
    assert builder.current(store, tuned) == image
    assert builder.current(store, builder.Options(kernel=KernelKind.CLOUD, source=source)) is None


def test_an_image_is_current_until_its_sources_change(
    tree: Fetched, tmp_path: Path, store: ImageStore
) -> None:
    options = builder.Options(source=agent_source(tmp_path / "source"))
    assert builder.current(store, options) is None
    (tmp_path / "work").mkdir()
    image = store.add("default", *builder.assemble(tree, tree, options, tmp_path / "work"))
    assert builder.current(store, options) == image
    assert builder.current(store, builder.Options(source=options.source, suite="sid")) is None
    (options.source / "rpc/errors.py").write_text("WORD = 'changed'\n")
    assert builder.current(store, options) is None


def test_a_damaged_image_is_not_current(tree: Fetched, tmp_path: Path, store: ImageStore) -> None:
    options = builder.Options(source=agent_source(tmp_path / "source"))
    (tmp_path / "work").mkdir()
    image = store.add("default", *builder.assemble(tree, tree, options, tmp_path / "work"))
    image.rootfs.write_bytes(b"")
    assert builder.current(store, options) is None


def test_nothing_is_fetched_for_a_build_without_an_agent(tmp_path: Path, store: ImageStore) -> None:
    with pytest.raises(NotFound, match="no agent"):
        builder.build(store, builder.Options(source=tmp_path), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
