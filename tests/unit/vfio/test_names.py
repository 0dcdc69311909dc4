"""Names from a pci.ids file, of which only what is asked for is looked at."""

from pathlib import Path

from vfio.names import PciNames

TEXT = """\
#\tList of PCI ID's
# a comment
0010  Allied Telesis, Inc (Wrong ID)
10de  NVIDIA Corporation
\t0020  NV4 [Riva TNT]
\t\t1043 0200  V3400 TNT
# in between
\t2330  GH100 [H100 SXM5 80GB]
1002  Advanced Micro Devices, Inc. [AMD/ATI]
\t2330  another's
C 03  Display controller
\t00  VGA compatible controller
"""


def test_vendor_and_device() -> None:
    names = PciNames(TEXT)
    assert names.vendor(0x10DE) == "NVIDIA Corporation"
    assert names.device(0x10DE, 0x2330) == "GH100 [H100 SXM5 80GB]"
    assert names.device(0x10DE, 0x0020) == "NV4 [Riva TNT]"
    assert names.device(0x1002, 0x2330) == "another's"


def test_what_is_not_there_has_no_name() -> None:
    names = PciNames(TEXT)
    assert names.vendor(0x8086) == ""
    assert names.device(0x8086, 0x1533) == ""
    assert names.device(0x10DE, 0x0200) == ""  # a subsystem's line is no device's
    assert names.device(0x0010, 0x0020) == ""  # the next vendor's is not mine
    assert PciNames().device(0x10DE, 0x2330) == ""


def test_the_first_file_that_is_there_counts(tmp_path: Path) -> None:
    (tmp_path / "pci.ids").write_text(TEXT)
    missing = str(tmp_path / "missing")
    assert PciNames.read((missing, str(tmp_path / "pci.ids"))).vendor(0x10DE) == "NVIDIA Corporation"
    assert PciNames.read((missing,)).vendor(0x10DE) == ""
