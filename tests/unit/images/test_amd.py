"""The variant with AMD's driver: the generic kernel's amdgpu, and the firmware of Debian's package."""

from pathlib import Path

import pytest

from images import builder
from images.amd import driver as amd
from images.kernel import KernelKind
from images.packages import Fetched
from images.store import ImageStore
from images.variant import Driver, Variant
from rpc.errors import FailedPrecondition, InvalidArgument
from tests.unit.images.fakes import RELEASE, agent_source, kernel_tree, python_tree

# What amdgpu takes from elsewhere in the kernel, and what it has for itself.
KERNEL = {
    "drivers/virtio_blk": "",
    "fs/erofs": "",
    "drivers/gpu/drm/ttm/ttm": "drm",
    "drivers/gpu/drm/drm": "",
    "drivers/gpu/drm/amd/amdxcp/amdxcp": "drm",
    "drivers/gpu/drm/amd/amdgpu/amdgpu": "amdxcp,ttm",
    "drivers/gpu/drm/radeon/radeon": "drm,ttm",
}


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    """As Debian's package has it: a file for each part of a chip, and links where two are the same."""
    firmware = tmp_path / "packages" / amd.FIRMWARE
    firmware.mkdir(parents=True)
    (firmware / "aldebaran_mec.bin").write_text("firmware")
    (firmware / "aldebaran_mec2.bin").symlink_to("aldebaran_mec.bin")
    other = firmware.with_name("radeon")
    other.mkdir()
    (other / "R100_cp.bin").write_text("another driver's")
    versions = {"firmware-amd-graphics": "20250410-2"}
    return Driver(f"amdgpu of {RELEASE}", (), tmp_path / "packages", versions)


def test_the_firmware_is_where_the_kernel_looks_for_it(driver: Driver, tmp_path: Path) -> None:
    root = tmp_path / "root"
    amd.add(driver, root)
    firmware = root / "usr/lib/firmware"
    assert [path.name for path in firmware.iterdir()] == ["amdgpu"]
    assert (firmware / "amdgpu/aldebaran_mec2.bin").readlink() == Path("aldebaran_mec.bin")
    assert (firmware / "amdgpu/aldebaran_mec2.bin").read_text() == "firmware"


def test_a_package_without_firmware_is_refused(driver: Driver, tmp_path: Path) -> None:
    for path in (driver.tree / amd.FIRMWARE).iterdir():
        path.unlink()
    with pytest.raises(FailedPrecondition, match="firmware-amd-graphics has no firmware"):
        amd.add(driver, tmp_path / "root")


def test_the_variant_has_amdgpu_and_says_so(driver: Driver, tmp_path: Path, store: ImageStore) -> None:
    tree = tmp_path / "tree"
    python_tree(tree)
    kernel_tree(tree, KERNEL)
    fetched = Fetched(tree, {"linux-image-amd64": "6.12.1-1"})
    source = agent_source(tmp_path / "source")
    options = builder.Options(variant=Variant.AMD, kernel=KernelKind.GENERIC, source=source)
    (tmp_path / "work").mkdir()
    files, about = builder.assemble(fetched, fetched, options, tmp_path / "work", driver=driver)
    assert (about["variant"], about["driver"]) == ("amd", f"amdgpu of {RELEASE}")
    assert about["driver_packages"] == {"firmware-amd-graphics": "20250410-2"}
    assert about["kernel_kind"] == "generic"
    root = tmp_path / "work/root"
    (line,) = (root / "usr/lib/casemate/modules.txt").read_text().splitlines()
    assert line == "amdgpu: " + " ".join(
        f"/usr/lib/modules/{name}.ko" for name in ("drm", "amdxcp", "ttm", "amdgpu")
    )
    assert sorted(path.name for path in (root / "usr/lib/modules").iterdir()) == [
        *("amdgpu.ko", "amdxcp.ko", "drm.ko", "ttm.ko")
    ]
    assert (root / "usr/lib/firmware/amdgpu/aldebaran_mec.bin").is_file()
    image = store.add(options.stored_as, files, about)
    assert image.name == "default-amd"
    assert builder.current(store, builder.Options(variant=Variant.AMD, source=source)) == image
    assert builder.current(store, builder.Options(variant=Variant.NVIDIA, source=source)) is None


def test_its_kernel_is_the_generic_one_and_no_other_images_is(tmp_path: Path, store: ImageStore) -> None:
    for kernel in (KernelKind.CLOUD, KernelKind.TUNED):
        options = builder.Options(variant=Variant.AMD, kernel=kernel)
        with pytest.raises(InvalidArgument, match="the variant amd is built for the generic kernel alone"):
            builder.build(store, options, tmp_path / "cache")
    for variant, words in (
        (None, "generic kernel is that of the variant amd alone"),
        (Variant.NVIDIA, "the variant nvidia is built for the cloud kernel alone"),
    ):
        options = builder.Options(variant=variant, kernel=KernelKind.GENERIC)
        with pytest.raises(InvalidArgument, match=words):
            builder.build(store, options, tmp_path / "cache")


def test_nothing_was_fetched_where_there_is_no_cache(tmp_path: Path) -> None:
    assert not amd.kept(tmp_path / "cache")
