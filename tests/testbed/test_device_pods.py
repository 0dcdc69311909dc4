"""Pods that are given devices of the host, under a real KVM with a real VFIO: what they see, what is left."""

import re
from typing import Any

import pytest

from tests.testbed.inside import cards, dma
from tests.testbed.inside.device_pods import WORDS

INSIDE = "device_pods"
DEVICES = "gpu-host"
GIB = 1 << 30
GPUS = [f"gpu{number}" for number in range(4)]


@pytest.fixture(scope="module")
def gpus(seen: Any) -> Any:
    return seen["gpus"]


def bars(line: str) -> list[int]:
    """Sizes, from the resource of a function as the container has it."""
    pairs = [part.split()[:2] for part in line.split(" ", 4)[4].split(";") if part.strip()]
    return [int(last, 16) - int(first, 16) + 1 for first, last in pairs if int(last, 16)]


# --- a disk ---


def test_a_disk_that_the_host_has_mounted_stays_the_hosts(seen: Any) -> None:
    mounted = seen["mounted"]
    assert mounted["done"]["code"] != 0
    assert "disk-in-use" in mounted["done"]["err"]
    assert "is mounted at /mnt" in mounted["done"]["err"]
    assert (mounted["driver"], mounted["is_mounted"], mounted["states"]) == ("nvme", True, {})


def test_a_container_writes_to_its_nvme_at_the_path_that_it_asked_for(seen: Any) -> None:
    assert seen["nvme"]["done"]["code"] == 0, seen["nvme"]["done"]
    assert seen["nvme"]["done"]["out"].endswith(WORDS)


def test_the_host_has_its_driver_again_and_finds_what_was_written(seen: Any) -> None:
    assert (seen["nvme"]["before"], seen["nvme"]["after"]) == ("nvme", "nvme")
    assert seen["nvme"]["words"] == WORDS


def test_it_was_reset_in_between(seen: Any) -> None:
    assert [line for line in seen["nvme"]["log"] if line.startswith(("bus in", "flr in"))]


# --- GPUs ---


def test_each_of_two_pods_sees_exactly_its_two_gpus_with_their_bars(gpus: Any) -> None:
    for lines in gpus["sees"].values():
        assert [line.split()[:2] for line in lines] == [["0x10de", "0x2330"]] * 2
        for line in lines:
            assert bars(line) == [16 << 20, 128 * GIB, 32 << 20]


def test_those_of_one_node_are_on_the_guests_one_node(gpus: Any) -> None:
    for name, lines in gpus["sees"].items():
        assert [line.split()[3] for line in lines] == ["0", "0"]
        assert len(gpus["records"][name]["nodes"]) == 1
    assert gpus["records"]["first"]["nodes"] != gpus["records"]["second"]["nodes"]


def test_the_ledger_and_the_list_say_who_has_which_two(seen: Any, gpus: Any) -> None:
    assert set(gpus["states"]) == set(GPUS)
    assert {state for state, _, _ in gpus["states"].values()} == {"in use"}
    pods = [gpus["states"][name][1] for name in GPUS]
    assert pods[0] == pods[1] != pods[2] == pods[3]  # each pod's are of one node
    assert set(pods) == {"first", "second"}
    for name, pod in zip(GPUS, pods, strict=True):
        assert gpus["list"][seen["places"][name]] == f"default/{pod}"


def test_ps_says_which_devices_and_by_which_way_and_the_trace_too(gpus: Any) -> None:
    for name, record in gpus["records"].items():
        assert {each["kind"] for each in record["devices"]} == {"gpu"}
        assert len(record["devices"]) == 2, name
        assert (record["device_access"], record["device_access_reason"]) == ("iommufd", "")
        assert record["source"] == "boot"
    (ready,) = [span for span in gpus["trace"]["spans"] if span["name"] == "devices.ready"]
    assert ready["detail"] == "iommufd"


def test_qemu_is_a_user_of_its_own_and_sees_its_own_nodes_alone(gpus: Any) -> None:
    first, second = gpus["qemu"]["first"], gpus["qemu"]["second"]
    assert first["uid"] != second["uid"]
    assert min(first["uid"], second["uid"]) >= 2_000_000_000
    for one in (first, second):
        assert {"iommu", "vfio/vfio"} < set(one["nodes"])
        cdevs = [name for name in one["nodes"] if name.startswith("vfio/devices/")]
        assert len(cdevs) == 2
        assert all(rights == [one["uid"], 0o600] for rights in one["nodes"].values())
    devices = [name for one in (first, second) for name in one["nodes"] if "devices" in name]
    assert len(set(devices)) == 4


def test_ram_may_be_locked_and_is_mapped_for_dma(gpus: Any) -> None:
    for name, one in gpus["qemu"].items():
        least = gpus["records"][name]["memory_bytes"]
        assert all(limit == "unlimited" or int(limit) >= least for limit in one["locked"])
    for name in GPUS:
        assert gpus["counted"][name]["mapped_bytes"] >= min(
            record["memory_bytes"] for record in gpus["records"].values()
        )


def test_ram_is_mapped_and_pinned_once_whatever_the_number_of_devices(seen: Any) -> None:
    one, four = seen["mapped"]["1"], seen["mapped"]["4"]
    assert one["access"] == four["access"] == "iommufd"
    assert one["ram_maps"] == four["ram_maps"] > 0
    assert (one["page_bytes"], four["page_bytes"]) == (0, 2 << 20)
    for boot in (one, four):  # the firmware is beside RAM
        assert boot["memory_bytes"] <= boot["pinned_bytes"] < boot["memory_bytes"] + (1 << 20)


@pytest.mark.parametrize(
    ("name", "page_bytes", "gpus"),
    [("ordinary", 0, GPUS[:2]), ("huge", 2 << 20, GPUS[:2]), ("others", 0, GPUS[2:])],
)
def test_a_restored_machine_has_its_devices_as_a_booted_one_has(
    seen: Any, name: str, page_bytes: int, gpus: list[str]
) -> None:
    """Whichever they are, of whichever node, and whatever its RAM is of."""
    one = seen["restored"][name]
    assert (one["record"]["source"], one["record"]["hugepage_bytes"]) == ("restore", page_bytes)
    assert [each["address"] for each in one["record"]["devices"]] == [seen["places"][gpu] for gpu in gpus]
    assert {"devices.plug", "devices.ready"} <= set(one["spans"])
    assert len(one["sees"]) == 2
    for line in one["sees"]:
        assert bars(line) == [16 << 20, 128 * GIB, 32 << 20]
        assert line.split()[3] == "0"  # the guest's one node
    assert len([path for path in one["qemu"]["open"] if "/dev/vfio/devices" in path]) == 2
    assert one["left"] == {}


def test_a_third_pod_is_refused_with_who_has_what(seen: Any, gpus: Any) -> None:
    assert gpus["third"]["code"] != 0
    assert "not free: 1 x gpu, device 2330" in gpus["third"]["err"]
    for name in GPUS:
        pod = gpus["states"][name][1]
        assert f"gpu {seen['places'][name]} is in use, pod default/{pod}" in gpus["third"]["err"]


# --- NUMA nodes and huge pages ---


@pytest.fixture(scope="module")
def numa(seen: Any) -> Any:
    assert seen["numa"]["sees"], seen["numa"]["ended"]
    return seen["numa"]


def test_the_guest_has_the_nodes_of_its_devices_and_each_device_is_on_its_own(numa: Any) -> None:
    nodes = [line for line in numa["sees"] if line.startswith("node ")]
    assert nodes == ["node 0 cpus 0", "node 1 cpus 1"]
    at = [line.split()[:4] for line in numa["sees"] if line.startswith("0x")]
    assert sorted((vendor, node) for vendor, _, _, node in at) == [
        ("0x10de", "0"),
        ("0x10de", "1"),
        ("0x1234", "-1"),  # the host names none, either
    ]
    sizes = [int(line.split()[-2]) >> 10 for line in numa["sees"] if "MemTotal" in line]
    assert len(sizes) == 2
    assert sum(sizes) > numa["record"]["memory_bytes"] * 3 // 4 >> 20


def test_its_cpus_run_on_those_of_their_nodes(numa: Any) -> None:
    assert numa["near"] == {"CPU 0/KVM": "0", "CPU 1/KVM": "1"}  # as the bed's nodes have them


def test_its_bars_are_whole_there_too(numa: Any) -> None:
    for line in numa["sees"]:
        if line.startswith("0x10de"):
            assert bars(line) == [16 << 20, 128 * GIB, 32 << 20]


def test_its_memory_is_of_huge_pages_of_both_nodes_from_its_start_until_it_is_gone(numa: Any) -> None:
    half = numa["record"]["memory_bytes"] // 2 >> 21
    assert numa["huge"] == {"0": half, "1": half}
    assert numa["during"] == [count - half for count in numa["before"]]
    assert numa["after"] == numa["before"]


def test_ps_and_the_trace_say_which_pages_they_are(numa: Any) -> None:
    record = numa["record"]
    assert (record["hugepage_bytes"], record["hugepage_reason"], record["nodes"]) == (2 << 20, "", [0, 1])
    assert numa["created"] == "huge pages of 2 MiB, NUMA nodes 0, 1"
    assert "3 by iommufd, 2MiB pages" in numa["ps"]


def test_a_pod_that_must_have_them_is_told_how_many_are_missing_and_who_has_them(numa: Any) -> None:
    half, left = numa["record"]["memory_bytes"] // 2 >> 21, numa["during"]
    assert numa["other"]["code"] != 0
    for node in (0, 1):
        missing = f"{half - left[node]} huge pages of 2048 KiB of NUMA node {node} ({half} wanted"
        assert missing in numa["other"]["err"]
        assert f"{half} huge pages of NUMA node {node} are claimed, pod default/numa" in numa["other"]["err"]
    assert numa["states"] == {}


# --- a virtual function of a network card ---


@pytest.fixture(scope="module")
def card(seen: Any) -> Any:
    assert seen["cards"]["talk"]["code"] == 0, seen["cards"]
    return seen["cards"]


def test_a_container_speaks_by_its_virtual_function_with_who_is_on_the_wire(card: Any) -> None:
    for address in (cards.HOST, cards.HOST6):
        assert f"{address} {cards.BYTES}\n" in card["talk"]["out"]
    assert card["callers"] == [f"::ffff:{cards.POD}", cards.POD6]


def test_its_interface_has_the_name_and_the_addresses_that_were_asked_for(card: Any) -> None:
    for address in (f"{cards.POD}/{cards.NETWORK}", f"{cards.POD6}/{cards.NETWORK6}"):
        assert re.search(rf"\b{cards.NAME}\b.* {re.escape(address)} ", card["talk"]["out"])


def test_it_was_reset_and_has_its_driver_again(card: Any) -> None:
    assert card["before"] == card["after"] != "vfio-pci"
    assert [line for line in card["log"] if line.startswith("flr in")]
    assert card["left"] == {}


def test_the_card_itself_stays_the_hosts(card: Any) -> None:
    assert card["whole"]["code"] != 0
    assert "vfs-enabled" in card["whole"]["err"]
    assert card["card"] == "igb"


def test_what_is_no_network_card_has_no_interface(card: Any) -> None:
    assert card["disk"]["code"] != 0
    assert "is a nvme, and has no interface to be set up" in card["disk"]["err"]


# --- DMA that a tenant makes ---


def test_a_device_reads_and_writes_its_guests_memory(seen: Any) -> None:
    assert seen["dma"]["done"]["code"] == 0, seen["dma"]
    tenant = seen["dma"]["tenant"]
    assert (tenant["read"], tenant["written"], tenant["words"]) == (True, True, dma.WORDS)


def test_it_reads_and_writes_nothing_outside_and_the_hosts_log_says_so(seen: Any) -> None:
    """A read that is stopped leaves zeros in QEMU's edu, where another device would have nothing."""
    assert seen["dma"]["kept"] == dma.SECRET
    assert seen["dma"]["tenant"]["stolen"] in ("", dma.WORDS)
    stopped = [line for line in seen["dma"]["faults"] if seen["dma"]["address"][5:] in line]
    for way in ("DMA Write", "DMA Read"):
        assert [line for line in stopped if way in line and f"{seen['dma']['outside']:#x}" in line], stopped


# --- what a kubelet has allocated ---


@pytest.fixture(scope="module")
def kubelets(seen: Any) -> Any:
    assert seen["kubelet"]["record"], seen["kubelet"]["ended"]
    return seen["kubelet"]


def test_a_pod_has_what_the_kubelet_has_allocated_to_its_containers(kubelets: Any) -> None:
    assert {name: state for name, (state, _, _) in kubelets["states"].items()} == {
        "nvme0": "in use",
        "gpu0": "in use",
    }
    assert {each["kind"] for each in kubelets["record"]["devices"]} == {"nvme", "gpu"}
    assert kubelets["trace"].index("devices.ask") < kubelets["trace"].index("devices.claim")


def test_each_container_has_its_own_of_it(kubelets: Any) -> None:
    nodes = {}
    for name, done in kubelets["containers"].items():
        assert done["code"] == 0, (name, done)
        nodes[name] = done["out"].splitlines()[0].split()[1:]
    assert nodes["main"] == nodes["named"] == ["nvme0", "nvme0n1"]
    assert nodes["side"] == nodes["bare"] == ["nvme*"]


def test_the_pods_log_says_what_the_kubelet_has_said(seen: Any, kubelets: Any) -> None:
    disk, gpu = seen["places"]["nvme0"], seen["places"]["gpu0"]
    log = kubelets["log"]
    assert f"has allocated casemate.example/disk {disk} to container 'main': {disk}" in log
    assert f"has allocated casemate.example/pgpu {gpu} to container 'side': {gpu}" in log
    assert "example.org/fuse of container side (0) is not the machine's to have" in log


def test_after_the_pod_they_are_free_and_bound_as_before(kubelets: Any) -> None:
    left, *drivers = kubelets["after"]
    assert not left.keys() & {"nvme0", "gpu0"}
    assert drivers == ["vfio-pci", "vfio-pci"]


def test_a_kubelet_that_does_not_say_is_the_pods_end(kubelets: Any) -> None:
    assert kubelets["silent"]["code"] != 0
    assert "the kubelet does not say which devices the pod has" in kubelets["silent"]["err"]
    assert "INTERNAL: out of order" in kubelets["silent"]["err"]


# --- a disk that is taken out of the host while its pod runs ---


@pytest.fixture(scope="module")
def pulled(seen: Any) -> Any:
    return seen["pulled"]


def test_the_host_need_not_wait_for_the_pods_end(pulled: Any) -> None:
    assert (pulled["removed"], pulled["there"]) == (0, False)


def test_the_pods_log_names_it_once_and_ps_says_so(pulled: Any) -> None:
    (line,) = [line for line in pulled["log"].splitlines() if "is gone from the pod's machine" in line]
    assert f"device {pulled['address']} (Red Hat, Inc. QEMU NVM Express Controller)" in line
    assert (pulled["before"], pulled["after"]) == ([False], [True])
    assert "1 by iommufd, 1 gone" in pulled["ps"]


def test_the_guests_console_has_said_when_it_came_up(pulled: Any) -> None:
    came = rf"casemate agent: device {pulled['address']}, \S+, after \d+\.\d s: nvme nvme0n1 "
    assert re.search(came, pulled["console"]), pulled["console"]


def test_the_container_goes_on_without_it(pulled: Any) -> None:
    assert pulled["exec"]["out"] == "node\n0\ngoes on\n", pulled["exec"]


def test_it_is_the_pods_until_that_ends_then_quarantined_and_free_once_it_is_back(pulled: Any) -> None:
    assert pulled["claims"] == ["in use", ""]
    assert pulled["later"]["code"] != 0
    assert "is not there" in pulled["later"]["err"]
    assert pulled["ended"][0] == 128 + 9
    assert pulled["quarantined"] == ["quarantined", f"device {pulled['address']} is not there any more"]
    assert pulled["cleared"]["code"] == 0, pulled["cleared"]
    assert ("nvme0" in pulled["states"], pulled["driver"]) == (False, "nvme")


# --- when something is killed ---


def test_a_killed_qemu_ends_the_container_and_its_gpus_are_free(gpus: Any) -> None:
    assert gpus["qemu_killed"][0] == 128 + 9
    second = [name for name in GPUS if gpus["states"][name][1] == "second"]
    assert sorted(gpus["after_qemu"]) == second


def test_a_killed_shim_leaves_a_ledger_that_is_right(gpus: Any) -> None:
    assert gpus["shim_killed"] != 0
    assert gpus["after_shim"] == {}
    assert set(gpus["drivers"].values()) == {""}  # as they were before


# --- by a node, the legacy way, a card that is not what it was ---


@pytest.fixture(scope="module")
def odd(seen: Any) -> Any:
    return seen["by_node"]


def test_a_name_of_cdi_is_a_request_for_the_device_and_a_card_has_its_functions(odd: Any) -> None:
    lines = {tuple(line.split()[:2]): line for line in odd["sees"]}
    assert set(lines) == {("0x1234", "0x11e8"), ("0x10de", "0x2230"), ("0x10de", "0x1aef")}
    assert bars(lines["0x1234", "0x11e8"])[0] == 1 << 20
    card, audio = (lines["0x10de", ids].split()[2] for ids in ("0x2230", "0x1aef"))
    assert (card[:-1], card[-1], audio[-1]) == (audio[:-1], "0", "1")


def test_without_iommufd_they_are_passed_the_legacy_way(odd: Any) -> None:
    assert odd["record"]["device_access"] == "legacy"
    assert "no /dev/iommu" in odd["record"]["device_access_reason"]
    groups = [name for name in odd["qemu"]["nodes"] if name != "vfio/vfio"]
    assert len(groups) == 2
    assert set(odd["qemu"]["open"]) == {"/dev/vfio/vfio", *(f"/dev/{name}" for name in groups)}


def test_devices_go_beside_files_by_9p(odd: Any) -> None:
    assert odd["record"]["files"] == "9p"


def test_the_nodes_of_cdi_are_the_devices_or_the_groups_also_while_a_pod_has_it(odd: Any) -> None:
    (bound,) = odd["bound"]["devices"]
    assert (bound["before"], bound["driver"]) == (None, "vfio-pci")
    assert odd["iommufd_nodes"] == [bound["device_node"]]
    assert odd["nodes"] == odd["nodes_then"] == [bound["group_node"]]


def test_what_was_bound_ahead_stays_bound_and_is_free(odd: Any) -> None:
    assert "edu0" not in odd["states"]
    assert odd["drivers"]["edu0"] == "vfio-pci"


def test_a_card_that_comes_back_from_its_reset_with_less_is_quarantined_until_it_is_cleared(odd: Any) -> None:
    state, pod, reason = odd["states"]["a6000"]
    assert (state, pod) == ("quarantined", "odd")
    assert "link of 8 lanes, was 16" in reason
    assert odd["drivers"]["a6000"] == "vfio-pci"
    assert odd["cleared"]["code"] == 0, odd["cleared"]


def test_an_operator_binds_and_gives_back_and_resets_what_is_free(seen: Any) -> None:
    ahead = seen["ahead"]
    (gpu,) = ahead["gpu"]["devices"]
    assert gpu["reset"].startswith("bus in ")
    assert gpu["quarantined"] is None
    assert [each["driver"] for each in ahead["edu"]["devices"]] == [None]
    assert ahead["driver"] == "vfio-pci"
    assert [(each["before"], each["driver"]) for each in ahead["unbound"]["devices"]] == [
        ("vfio-pci", "nvme")
    ]
    assert ahead["disk"].startswith("/dev/nvme")


def test_no_device_is_left_in_a_file_of_cdi(seen: Any) -> None:
    assert seen["ahead"]["cdi"]["code"] == 1
    assert "no device of kind example.org/device can be listed" in seen["ahead"]["cdi"]["err"]
    assert seen["ahead"]["cdi_files"] == []


def test_an_operator_too_leaves_a_mounted_disk_to_the_host(seen: Any) -> None:
    for done in seen["ahead"]["mounted"].values():
        assert done["code"] == 1
        assert "disk-in-use" in done["err"]


def test_nothing_is_left(seen: Any) -> None:
    assert seen["end"]["pods"] == []
    assert seen["end"]["states"].keys() <= {"a6000-audio"}
