"""A pod's devices from what it asks for to its machine's functions, and back: a ledger, a bus, an audit."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.annotations import DEVICES
from config.settings import Settings
from rpc.errors import CasemateError, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from shim.devicewishes import DeviceWishes
from tests.unit.shim.devicehosts import (
    AUDIO,
    CARD,
    DISK,
    FIRST,
    RAM,
    SECOND,
    DeviceHost,
    node,
    settings_in_memory,
    wishes,
)
from tests.unit.vfio.machines import CONNECTX6_DX, CONNECTX_VF, H100, INTEL_PORT, NVME
from tests.unit.vfio.trees import ROOT_PORT
from vfio.address import PciAddress
from vfio.kinds import NVIDIA
from vfio.ledger.ledger import Ledger

NATIVE = {FIRST: "nvidia", SECOND: "nvidia", CARD: "nvidia", AUDIO: "snd_hda_intel", DISK: "nvme"}


@pytest.fixture
def host(tmp_path: Path) -> DeviceHost:
    return DeviceHost(tmp_path / "host")


@pytest.fixture
def settings() -> Iterator[Settings]:
    with settings_in_memory() as settings:
        yield settings


def text(words: str) -> DeviceWishes:
    return wishes(text=words)


def test_a_named_device_is_claimed_bound_in_use_and_free_again(host: DeviceHost, settings: Settings) -> None:
    giver = host.giver(settings)
    given = giver.take(text("01:00.0,path=/dev/gpu"), RAM)
    (function,) = given.functions
    assert (function.address, function.kind, function.port, function.function) == (
        "0000:01:00.0",
        "gpu",
        0,
        0,
    )
    assert (function.path, function.by_text, function.several) == ("/dev/gpu", True, False)
    assert function.cdev == "vfio1"
    assert function.bar_bytes == sum(size for size, _ in H100.bars.values())
    assert function.vendor == NVIDIA
    assert host.states(settings) == {FIRST: "in use"}
    assert host.drivers() == NATIVE | {FIRST: "vfio-pci"}
    giver.give_back(given.claim)
    assert host.states(settings) == {}
    assert host.drivers() == NATIVE
    assert [address for address, _ in host.kernel.resets] == ["0000:01:00.0"]
    giver.give_back(given.claim)  # by whoever is not sure
    assert len(host.kernel.resets) == 1


def test_two_of_a_kind_are_behind_ports_of_their_own(host: DeviceHost, settings: Settings) -> None:
    functions = host.giver(settings).take(text("count=2,vendor=10de,device=2330,same=node"), RAM).functions
    assert [(each.address, each.port, each.function) for each in functions] == [
        ("0000:01:00.0", 0, 0),
        ("0000:02:00.0", 1, 0),
    ]


def test_the_functions_of_a_card_stay_together(host: DeviceHost, settings: Settings) -> None:
    functions = host.giver(settings).take(text("03:00.0; 01:00.0"), RAM).functions
    assert [(each.address, each.port, each.function, each.several) for each in functions] == [
        ("0000:01:00.0", 0, 0, False),
        ("0000:03:00.0", 1, 0, True),
        ("0000:03:00.1", 1, 1, True),
    ]
    assert host.states(settings) == {FIRST: "in use", CARD: "in use", AUDIO: "in use"}
    assert host.drivers()[AUDIO] == "vfio-pci"


def test_the_rest_of_a_group_is_bound_and_not_in_the_machine(host: DeviceHost, settings: Settings) -> None:
    group = host.tree.new_group()
    port = host.port()
    for slot in (0, 1):
        host.tree.function(port, NVME, slot=slot, group=group)
    host.look_again()
    functions = host.giver(settings).take(text("05:01.0"), RAM).functions
    assert [each.address for each in functions] == ["0000:05:01.0"]
    assert {host.kernel.driver(PciAddress.parse(f"05:0{slot}.0")) for slot in (0, 1)} == {"vfio-pci"}


def test_a_vf_is_alone_behind_its_port_as_function_0(host: DeviceHost, settings: Settings) -> None:
    card = host.tree.function(host.port(), CONNECTX6_DX)
    first, second = host.tree.vfs(card, CONNECTX_VF, 2, 8)
    host.look_again()
    functions = host.giver(settings).take(text(f"{first.address}, {second.address}"), RAM).functions
    assert [(each.address, each.port, each.function) for each in functions] == [
        ("0000:05:00.1", 0, 0),
        ("0000:05:00.2", 1, 0),
    ]


def test_nodes_of_vfio_are_requests_too(host: DeviceHost, settings: Settings) -> None:
    group = int((host.node[CARD].directory / "iommu_group").readlink().name)
    by_node = wishes(node(group, ""), node(None, "0000:04:00.0", "/dev/data"), node(group, ""))
    functions = host.giver(settings).take(by_node, RAM).functions
    assert [(each.address, each.by_text, each.path) for each in functions] == [
        ("0000:03:00.0", False, ""),
        ("0000:03:00.1", False, ""),
        ("0000:04:00.0", False, ""),
    ]
    with pytest.raises(NotFound, match="no device in the IOMMU group 77"):
        host.giver(settings, "other").take(wishes(node(77, "")), RAM)


def test_what_several_nodes_name_is_asked_for_once(host: DeviceHost, settings: Settings) -> None:
    group = int((host.node[CARD].directory / "iommu_group").readlink().name)
    by_node = wishes(node(None, str(AUDIO)), node(group, ""), node(None, str(CARD)))
    functions = host.giver(settings).take(by_node, RAM).functions
    assert [each.address for each in functions] == [str(CARD), str(AUDIO)]


# --- what goes wrong ---


def test_what_a_node_and_the_annotation_name_is_refused(host: DeviceHost, settings: Settings) -> None:
    both = DeviceWishes(nodes=(node(None, str(FIRST)),), text=f"count=1,kind=gpu; {FIRST}")
    error = refused(host, settings, both)
    assert isinstance(error, InvalidArgument)
    assert error.brief.startswith(f"device {FIRST} is asked for by the annotation {DEVICES}, and by")


def refused(host: DeviceHost, settings: Settings, wishes: DeviceWishes, pod: str = "web") -> CasemateError:
    """Nothing is claimed or bound by it that was not before."""
    before = host.states(settings), host.drivers()
    with pytest.raises(CasemateError) as caught:
        host.giver(settings, pod).take(wishes, RAM)
    assert (host.states(settings), host.drivers()) == before
    return caught.value


@pytest.mark.parametrize("wish", ["01:00.0", "count=2,device=2330"])
def test_a_second_pod_is_told_who_has_it(host: DeviceHost, settings: Settings, wish: str) -> None:
    host.giver(settings).take(text("01:00.0"), RAM)
    group = (host.node[FIRST].directory / "iommu_group").readlink().name
    host.tree.process(4711, "qemu-system-x86", f"/dev/vfio/{group}")
    error = refused(host, settings, text(wish), "other")
    assert isinstance(error, ResourceExhausted)
    assert "gpu 0000:01:00.0 is in use, pod default/web" in str(error.details)


def test_a_pod_has_one_claim(host: DeviceHost, settings: Settings) -> None:
    host.giver(settings).take(text("01:00.0"), RAM)
    assert "has claim 1 already" in refused(host, settings, text("02:00.0")).brief


def test_a_mounted_disk_is_never_unbound(host: DeviceHost, settings: Settings) -> None:
    host.tree.nvme(host.node[DISK], 0)
    host.tree.mounts(("259:0", "/dev/nvme0n1", "/srv"))
    error = refused(host, settings, text("04:00.0"))
    assert isinstance(error, FailedPrecondition)
    assert "disk-in-use" in error.brief
    assert "/dev/nvme0n1 is mounted at /srv" in str(error.details)
    assert host.kernel.written == []


def test_a_request_that_names_none_passes_by_what_is_refused(host: DeviceHost, settings: Settings) -> None:
    host.tree.process(4711, "nvidia-smi", "/dev/nvidia0")
    host.tree.put(f"proc/driver/nvidia/gpus/{FIRST}/information", "Device Minor: \t 0\n")
    (function,) = host.giver(settings).take(text("device=2330"), RAM).functions
    assert function.address == str(SECOND)
    error = refused(host, settings, text("device=2330"), "other")
    assert "gpu 0000:02:00.0 is in use, pod default/web" in str(error.details)
    assert "gpu 0000:01:00.0 is not given to a pod: open-handles" in str(error.details)


def test_a_group_that_is_not_viable_is_refused(host: DeviceHost, settings: Settings) -> None:
    """A bridge of it has a driver that VFIO does not go beside."""
    group = int((host.node[DISK].directory / "iommu_group").readlink().name)
    odd = host.tree.bridge(host.bus, INTEL_PORT, ROOT_PORT, group=group)
    host.tree.bind(odd, "shpchp")
    assert "group-not-viable" in refused(host, settings, text("04:00.0")).brief


def test_a_device_that_is_not_there_is_not_found(host: DeviceHost, settings: Settings) -> None:
    assert isinstance(refused(host, settings, text("77:00.0")), NotFound)
    vanished = wishes(node(None, "0000:77:00.0"))
    assert "no PCI device 0000:77:00.0" in refused(host, settings, vanished).brief
    assert "is not for pods" in refused(host, settings, wishes(node(None, "0000:00:00.0"))).brief


def with_partitions(settings: Settings, **members: tuple[PciAddress, ...]) -> Settings:
    table = {name: tuple(map(str, each)) for name, each in members.items()}
    return settings.replace(vfio=settings.vfio.replace(partitions=table))


def test_an_nvlink_partition_is_given_as_a_whole(host: DeviceHost, settings: Settings) -> None:
    settings = with_partitions(settings, one=(SECOND,), two=(FIRST, SECOND), odd=(FIRST, CARD))
    wish = text("count=2,device=2330,partition=yes")
    giver = host.giver(settings)
    given = giver.take(wish, RAM)
    assert {each.address for each in given.functions} == {str(FIRST), str(SECOND)}
    with Ledger(Path(settings.ledger_dir)) as ledger:
        assert ledger.get(given.claim).partitions == ("two",)
    giver.give_back(given.claim)
    # The lowest address would be the other one, which is no partition.
    (alone,) = host.giver(settings, "next").take(text("kind=gpu,partition=yes"), RAM).functions
    assert alone.address == str(SECOND)
    assert (
        "not free: 2 x device, device 2330, one NVLink partition"
        in refused(host, settings, wish, pod="third").brief
    )


def test_what_is_wrong_with_nvlink_partitions_is_said_to_who_wants_one(
    host: DeviceHost, settings: Settings
) -> None:
    wish = text("count=2,kind=gpu,partition=yes")
    error = refused(host, settings, wish)
    assert "cannot give 2 x gpu, one NVLink partition" in error.brief
    assert "the configuration has no NVLink partition (vfio.partitions)" in str(error.details)
    gone = PciAddress.parse("99:00.0")
    settings = with_partitions(settings, one=(FIRST,), two=(FIRST, gone), disks=(SECOND, DISK))
    lines = str(refused(host, settings, wish).details).splitlines()
    assert lines[-3:] == [
        "NVLink partitions, and of how many devices: one (1), two (2), disks (2)",
        "NVLink partition two cannot be given: 0000:99:00.0 is not there",
        "NVLink partition disks cannot be given: 0000:04:00.0 is no GPU but of kind nvme",
    ]
    assert len(host.giver(settings).take(text("count=2,device=2330"), RAM).functions) == 2


def test_no_iommu_is_said(tmp_path: Path, host: DeviceHost, settings: Settings) -> None:
    for each in host.node.values():
        (each.directory / "iommu_group").unlink()
    assert "iommu-off" in refused(host, settings, text("01:00.0")).brief
    assert "iommu-off" in str(refused(host, settings, text("device=2330")).details)


def test_a_driver_that_cannot_be_bound_leaves_all_as_it_was(host: DeviceHost, settings: Settings) -> None:
    host.kernel.refused["drivers/vfio-pci/bind"] = errno.EBUSY
    error = refused(host, settings, text("01:00.0, 02:00.0"))
    assert "cannot go from" in error.brief
    with Ledger(Path(settings.ledger_dir)) as ledger:
        assert ledger.claims() == []
        assert ledger.bindings() == []
    assert host.kernel.resets == []


def test_one_that_is_pulled_out_while_a_pod_has_it_is_quarantined(
    host: DeviceHost, settings: Settings
) -> None:
    giver = host.giver(settings)
    claim = giver.take(text("01:00.0, 02:00.0"), RAM).claim
    host.tree.remove(host.node[FIRST])
    giver.give_back(claim)
    assert host.states(settings) == {FIRST: "quarantined"}
    assert host.drivers()[SECOND] == "nvidia"


def test_one_that_was_pulled_out_before_is_not_there(host: DeviceHost, settings: Settings) -> None:
    host.tree.remove(host.node[FIRST])
    with pytest.raises(NotFound, match=r"0000:01:00\.0 is not there"):
        host.giver(settings).take(text("01:00.0, 02:00.0"), RAM)
    assert host.states(settings) == {}


WRITES = 6
"""To bind two devices: of each its override, its driver's unbind, and the bind."""


@pytest.mark.parametrize("step", range(WRITES))
def test_one_that_is_pulled_out_while_it_is_bound_fails_the_pod_and_nobody_has_it(
    host: DeviceHost, settings: Settings, step: int
) -> None:
    def pull() -> None:
        if len(host.kernel.written) == step:
            host.tree.remove(host.node[FIRST])

    host.kernel.before = pull
    with pytest.raises(CasemateError, match=str(FIRST)):
        host.giver(settings).take(text("01:00.0, 02:00.0"), RAM)
    assert host.states(settings) == {}
    assert host.drivers()[SECOND] == "nvidia"
    with Ledger(Path(settings.ledger_dir)) as ledger:
        assert ledger.claims() == []
        assert ledger.bindings() == []
    (function,) = host.giver(settings, "next").take(text("02:00.0"), RAM).functions
    assert function.address == str(SECOND)


def test_binding_two_devices_takes_so_many_writes(host: DeviceHost, settings: Settings) -> None:
    host.giver(settings).take(text("01:00.0, 02:00.0"), RAM)
    assert len(host.kernel.written) == WRITES


def test_the_audit_log_says_who_did_it_and_for_whom(host: DeviceHost, settings: Settings) -> None:
    giver = host.giver(settings)
    claim = giver.take(text("01:00.0"), RAM).claim
    giver.give_back(claim)
    with Ledger(Path(settings.ledger_dir)) as ledger:
        entries = ledger.log(FIRST)
        assert {entry.actor.partition(",")[0] for entry in entries} == {"the shim of default/web"}
        changes = [entry.after.value for entry in entries if entry.after is not None]
        assert changes == ["claimed", "in use", "resetting", "free"]
        (use,) = ledger.usage()
        assert (use.pod.tenant, use.to_s is not None) == ("red", True)
