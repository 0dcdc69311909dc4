"""Which of the host's devices a container asks for: by nodes of VFIO's, by annotation; what is wrong."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.annotations import DEVICES
from rpc.errors import FailedPrecondition, InvalidArgument
from shim import oci
from shim.devicewishes import MOST_BYTES, is_vfio, parse, vfio_node, wishes_of
from tests.unit.shim.devicehosts import node
from vfio.address import PciAddress
from vfio.ledger.demand import MOST_DEVICES, Request, Same

LINKS = {
    "10:196": "../../devices/virtual/misc/vfio",
    "10:125": "../../devices/virtual/misc/iommu",
    "243:0": "../../devices/virtual/vfio/12",
    "243:1": "../../devices/virtual/vfio/noiommu-3",
    "511:3": "../../devices/pci0000:3a/0000:3a:00.0/0000:3b:00.0/vfio-dev/vfio3",
    "1:3": "../../devices/virtual/mem/null",
}


@pytest.fixture
def sysfs(tmp_path: Path) -> str:
    """Links of /sys/dev/char, as Linux 6.12 has them."""
    (tmp_path / "dev/char").mkdir(parents=True)
    for number, target in LINKS.items():
        (tmp_path / "dev/char" / number).symlink_to(target)
    return str(tmp_path)


def spec(*devices: dict[str, Any], text: str | None = None) -> oci.Spec:
    annotations = {} if text is None else {DEVICES: text}
    return oci.parse({"linux": {"devices": list(devices)}, "annotations": annotations})


def char(path: str, number: str, **more: Any) -> dict[str, Any]:
    major, _, minor = number.partition(":")
    return {"path": path, "type": "c", "major": int(major), "minor": int(minor)} | more


def test_a_group_and_a_device_are_known_by_their_numbers(sysfs: str) -> None:
    wishes = wishes_of(
        spec(
            char("/dev/vfio/12", "243:0"),
            char("/dev/data", "511:3", fileMode=0o100640, uid=5, gid=6),
            char("/dev/vfio/vfio", "10:196"),
            char("/dev/iommu", "10:125"),
            char("/dev/null", "1:3"),
            {"path": "/dev/sdb", "type": "b", "major": 243, "minor": 0},
        ),
        sysfs,
    )
    assert wishes.nodes == (node(12), node(None, "0000:3b:00.0", "/dev/data", 0o640, 5, 6))
    assert wishes.text == ""
    assert wishes


def test_who_asks_for_nothing_has_no_wish(sysfs: str) -> None:
    assert not wishes_of(spec(char("/dev/vfio/vfio", "10:196"), char("/dev/iommu", "10:125")), sysfs)
    assert not wishes_of(oci.parse({}), sysfs)


def test_a_group_that_is_gone_or_has_no_iommu_is_refused_by_its_path(sysfs: str) -> None:
    (gone,) = spec(char("/dev/vfio/77", "243:9")).devices
    assert is_vfio(gone, sysfs)
    with pytest.raises(FailedPrecondition, match="device /dev/vfio/77: the host has no such device any more"):
        vfio_node(gone, sysfs)
    (unsafe,) = spec(char("/dev/vfio/noiommu-3", "243:1")).devices
    with pytest.raises(FailedPrecondition, match="no IOMMU is before it"):
        vfio_node(unsafe, sysfs)
    (other,) = spec(char("/dev/other", "240:9")).devices
    assert not is_vfio(other, sysfs)


@pytest.mark.parametrize("text", ["", "   ", "x" * (MOST_BYTES + 1)])
def test_an_annotation_is_not_empty_and_not_endless(text: str, sysfs: str) -> None:
    with pytest.raises(InvalidArgument, match=f"annotation {DEVICES} is (empty|too long)"):
        wishes_of(spec(text=text), sysfs)


def at(*texts: str) -> Request:
    return Request.at(*map(PciAddress.parse, texts))


@pytest.mark.parametrize(
    ("text", "requests", "paths", "together"),
    [
        ("0000:3b:00.0", [at("3b:00.0")], [""], None),
        ("3b:00.0, 3c:00.0", [at("3b:00.0", "3c:00.0")], [""], None),
        ("3b:00.0,path=/dev/data; 3c:00.0", [at("3b:00.0"), at("3c:00.0")], ["/dev/data", ""], None),
        ("count=2,vendor=10de", [Request(2, vendor=0x10DE)], [""], None),
        (
            "count=4,kind=gpu,vendor=0x10DE,device=2330,model=H100 SXM5,same=switch,partition=yes;",
            [Request(4, "gpu", 0x10DE, 0x2330, "H100 SXM5", Same.SWITCH, partition=True)],
            [""],
            None,
        ),
        ("kind=gpu; kind=nic; same=node", [Request(kind="gpu"), Request(kind="nic")], ["", ""], Same.NODE),
        ("kind=nvme,path=/dev/data", [Request(kind="nvme")], ["/dev/data"], None),
    ],
)
def test_requests(text: str, requests: list[Request], paths: list[str], together: Same | None) -> None:
    wishes, same = parse(text)
    assert [wish.request for wish in wishes] == requests
    assert [wish.path for wish in wishes] == paths
    assert same is together


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (";", "no device is asked for"),
        ("same=node;", "neither an address"),
        ("same=node; same=switch", "no device is asked for"),
        ("gpu0", "'gpu0' is not a PCI address"),
        ("3b:00.0,3b:00.0", "an address twice"),
        ("3b:00.0,count=1", "count= beside addresses"),
        ("count=0,kind=gpu", "from 1 to"),
        (f"count={MOST_DEVICES + 1}", f"is more than {MOST_DEVICES}"),
        ("count=two", "'two' is not a number"),
        ("count=²", "is not a number"),
        ("count=1,count=2", "'count=2'"),
        ("count", "'count' is not a PCI address"),
        ("vendor=10000", "'10000' is more than ffff"),
        ("vendor=", "'vendor='"),
        ("kind=bridge", "kind=bridge: known are gpu, "),
        ("colour=red", "'colour=red'"),
        ("kind=gpu,same=rack", "same=rack: known are node, switch"),
        ("kind=gpu,partition=maybe", "partition=maybe: yes or no"),
        ("kind=nvme,path=data", "path=data: an absolute path, of one device"),
        ("count=2,kind=nvme,path=/dev/data", "an absolute path, of one device"),
        ("3b:00.0,3c:00.0,path=/dev/data", "an absolute path, of one device"),
        ("count=2", "neither an address"),
        ("path=/dev/data", "neither an address"),
        ("count=2,kind=nic,interface=net1", "interface= and ip= are of one network card"),
        ("kind=gpu,ip=192.0.2.7/24", "interface= and ip= are of one network card"),
        ("3b:00.0,interface=lo", "interface=lo: no name of an interface"),
        ("3b:00.0,interface=a/b", "no name of an interface"),
        ("3b:00.0,interface=casemate0", "no name of an interface"),
        ("3b:00.0,interface=sixteen-letters-", "no name of an interface"),
        ("3b:00.0,ip=192.0.2.300/24", "ip=192.0.2.300/24: no address as"),
        ("3b:00.0,ip=", "ip=: no address as"),
        ("kind=gpu;" * 17, "more than 16 requests"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(text)
    assert said in str(caught.value)


def test_a_network_card_has_a_name_and_addresses() -> None:
    (wish,), _ = parse("kind=nic,interface=net1,ip=192.0.2.7/24,ip=2001:db8::7/64")
    assert (wish.interface, wish.ips) == ("net1", ("192.0.2.7/24", "2001:db8::7/64"))
    (wish,), _ = parse("3b:10.0,ip=192.0.2.7")
    assert (wish.interface, wish.ips) == ("", ("192.0.2.7/32",))


@given(st.text(alphabet="count=2,;kndvreogpath/same.:0f \0\n", max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        wishes, _ = parse(text)
    except InvalidArgument:
        return
    assert wishes
