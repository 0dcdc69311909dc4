"""Which class is which kind; the ones that a mask would lose."""

import pytest

from vfio.kinds import SKIPPED, Kind, kind_of

INTEL, AMD_CPU, NVIDIA, AMD, OTHER = 0x8086, 0x1022, 0x10DE, 0x1002, 0x1AF4


@pytest.mark.parametrize(
    ("class_code", "vendor", "kind"),
    [
        (0x030000, NVIDIA, Kind.GPU),
        (0x030200, NVIDIA, Kind.GPU),
        (0x038000, AMD, Kind.GPU),  # Instincts before the MI300
        (0x120000, AMD, Kind.GPU),
        (0x120000, 0x1DA3, Kind.ACCELERATOR),  # Gaudi
        (0x068000, NVIDIA, Kind.NVSWITCH),
        (0x068000, INTEL, Kind.PLATFORM),  # P2SB
        (0x060400, NVIDIA, Kind.BRIDGE),
        (0x020000, INTEL, Kind.NIC),
        (0x020700, 0x15B3, Kind.NIC),
        (0x010802, 0x144D, Kind.NVME),
        (0x010601, INTEL, Kind.STORAGE),
        (0x040300, NVIDIA, Kind.AUDIO),
        (0x0C0330, NVIDIA, Kind.USB),
        (0x0C8000, NVIDIA, Kind.PLATFORM),
        (0x0C0500, INTEL, Kind.PLATFORM),
        (0x078000, INTEL, Kind.PLATFORM),  # MEI
        (0x078000, OTHER, Kind.OTHER),  # virtio-serial
        (0x00FF00, 0x1234, Kind.OTHER),  # QEMU's edu
        (0xFFFF00, OTHER, Kind.OTHER),
        (0x080600, AMD_CPU, Kind.PLATFORM),  # its IOMMU
    ],
)
def test_kind_of(class_code: int, vendor: int, kind: Kind) -> None:
    assert kind_of(class_code, vendor, is_bridge=False) is kind


def test_who_has_a_bridges_header_is_one_whatever_its_class() -> None:
    assert kind_of(0x068000, NVIDIA, is_bridge=True) is Kind.BRIDGE


def test_skipped_are_bridges_and_the_chipset_only() -> None:
    assert set(SKIPPED) == {Kind.BRIDGE, Kind.PLATFORM}
