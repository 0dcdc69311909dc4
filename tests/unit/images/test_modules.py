"""Kernel modules: load order, what is built in, signatures, the list that the agent reads."""

import lzma
from pathlib import Path

import pytest

from images.kernel import find_kernel
from images.modules import ModuleTree, driver_list, feature_list, unsigned
from rpc.errors import FailedPrecondition
from tests.unit.images.fakes import kernel_tree, module, signed


def tree(path: Path, modules: dict[str, str], builtin: tuple[str, ...] = ()) -> ModuleTree:
    kernel_tree(path, modules, builtin)
    return ModuleTree(find_kernel(path).modules)


def test_dependencies_come_first_and_once(tmp_path: Path) -> None:
    modules = {"a/top": "left,right", "a/left": "base", "b/right": "base", "b/base": "", "c/unused": ""}
    found = tree(tmp_path, modules).load_order(["top", "base", "right"])
    assert [m.name for m in found] == ["base", "left", "right", "top"]


def test_a_built_in_module_needs_no_file(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"a/top": "virtio-core"}, ("drivers/virtio_core",))
    assert [m.name for m in modules.load_order(["top", "virtio-core"])] == ["top"]
    assert modules.is_builtin("virtio-core")
    assert modules.has("virtio_core")
    assert not modules.has("nothing")


def test_dashes_and_underscores_are_the_same(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"a/virtio-rng": "with_dash", "a/with-dash": ""})
    assert [m.name for m in modules.load_order(["virtio_rng"])] == ["with_dash", "virtio_rng"]


def test_a_missing_dependency_is_named_with_who_needs_it(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="no module gone, which top needs"):
        tree(tmp_path, {"a/top": "gone"}).load_order(["top"])


def test_modules_in_a_circle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="circle: a b a"):
        tree(tmp_path, {"x/a": "b", "x/b": "a"}).load_order(["a"])


def test_soft_dependencies_come_before_as_far_as_the_kernel_has_them(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"lib/libcrc32c": "", "crypto/crc32c_generic": "", "fs/erofs": "libcrc32c"})
    (file,) = tmp_path.rglob("libcrc32c.ko.xz")
    for words, order in (
        (b"softdep=pre: crc32c", ["crc32c_generic", "libcrc32c", "erofs"]),
        (b"softdep=pre: gone crc32c post: late", ["crc32c_generic", "libcrc32c", "erofs"]),
        (b"softdep=post: crc32c", ["libcrc32c", "erofs"]),
        (b"softdep=pre: gone", ["libcrc32c", "erofs"]),
    ):
        file.write_bytes(lzma.compress(module() + b"\0" + words + b"\0"))
        assert [m.name for m in modules.load_order(["erofs"])] == order


def test_signatures_are_taken_off(tmp_path: Path) -> None:
    plain = module("x", b"body")
    assert unsigned(signed(plain)) == plain
    assert unsigned(plain) == plain
    (loaded,) = tree(tmp_path, {"a/top": ""}).load_order(["top"])
    assert loaded.content == module("", b"a/top")


def test_a_file_that_is_no_module_is_refused(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"a/top": ""})
    (file,) = tmp_path.rglob("top.ko.xz")
    plain = file.with_suffix("")
    file.unlink()
    plain.write_bytes(b"\x7fELF without a modinfo section")
    with pytest.raises(FailedPrecondition, match="no dependencies"):
        ModuleTree(find_kernel(tmp_path).modules).load_order(["top"])
    assert modules.has("top")


def test_the_feature_list_names_what_there_is(tmp_path: Path) -> None:
    modules = tree(
        tmp_path,
        {"net/vmw_vsock_virtio_transport": "vsock", "net/vsock": "", "fs/overlay": ""},
        ("drivers/virtio_console", "fs/fuse/virtiofs"),
    )
    text, files = feature_list(modules, "/m")
    assert text.splitlines() == [
        "serial:",
        "vsock: /m/vsock.ko /m/vmw_vsock_virtio_transport.ko",
        "virtiofs:",
        "overlay: /m/overlay.ko",
    ]
    assert sorted(files) == ["overlay.ko", "vmw_vsock_virtio_transport.ko", "vsock.ko"]


def test_the_driver_list_has_the_aliases_of_drivers_that_are_modules(tmp_path: Path) -> None:
    modules = tree(
        tmp_path, {"net/igbvf": "", "fs/overlay": "", "net/iavf": "lib", "net/lib": ""}, ("d/nvme",)
    )
    for name, aliases in {
        "igbvf": ("pci:v00008086d0000152Dsv*sd*bc*sc*i*", "pci:v00008086d000010CAsv*sd*bc*sc*i*", "virtual"),
        "iavf": ("pci:v00008086d00001889sv*sd*bc*sc*i*",),
        "lib": ("pci:v00008086d00009999sv*sd*bc*sc*i*",),
    }.items():
        (file,) = tmp_path.rglob(f"{name}.ko.xz")
        words = "".join(f"alias={alias}\0" for alias in aliases).encode()
        file.write_bytes(lzma.compress(lzma.decompress(file.read_bytes()) + b"\0" + words))
    assert driver_list(modules).splitlines() == [
        "pci:v00008086d0000152Dsv*sd*bc*sc*i* igbvf",
        "pci:v00008086d000010CAsv*sd*bc*sc*i* igbvf",
        "pci:v00008086d00001889sv*sd*bc*sc*i* iavf",
    ]
