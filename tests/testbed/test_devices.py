"""What `casemate gpu` says of a host with GPUs is what its topology says: devices.py, gpu-host."""

from typing import Any

import pytest

from tests.testbed.conftest import Look
from tests.testbed.devices import TOPOLOGIES, Wiring

DEVICES = "gpu-host"
GIB = 1 << 30
# Of each device: its ids, its kind, its NUMA node, its largest BAR, ways to reset it. Linux looks for those
# before it knows what else is on the bus, so that a6000 and edu1 have "bus", which will not work.
EXPECTED = {
    **{f"gpu{number}": ("10de:2330", "gpu", number // 2, 128 * GIB, "flr bus") for number in range(4)},
    "a6000": ("10de:2230", "gpu", None, 256 << 20, "flr bus"),
    "a6000-audio": ("10de:1aef", "audio", None, 16 << 10, "flr"),
    "nvme0": ("1b36:0010", "nvme", 0, 16 << 10, "flr bus"),
    "nvme1": ("1b36:0010", "nvme", 1, 16 << 10, "flr bus"),
    "nic0": ("8086:10c9", "nic", 0, 128 << 10, "flr pm bus"),
    "nic1": ("8086:10c9", "nic", None, 128 << 10, "flr pm bus"),
    "edu0": ("1234:11e8", "other", None, 1 << 20, "bus"),
    "edu1": ("1234:11e8", "other", None, 1 << 20, "bus"),
    "edu2": ("1234:11e8", "other", None, 1 << 20, ""),
    "edu3": ("1234:11e8", "other", 1, 1 << 20, "bus"),
}


@pytest.fixture(scope="module")
def seen(look_inside: Look) -> Any:
    return look_inside("gpu_host", DEVICES)["devices"]


@pytest.fixture(scope="module")
def by_name(seen: Any) -> dict[str, Any]:
    devices = {each["address"]: each for each in seen["list"]["said"]["devices"]}
    return {name: devices[address] for name, address in seen["places"].items()}


def codes(findings: list[Any], *addresses: str) -> set[str]:
    return {each["code"] for each in findings if not addresses or each["subject"] in addresses}


def test_every_device_is_where_the_topology_has_it(seen: Any, tmp_path: Any) -> None:
    assert set(seen["places"]) == set(Wiring(TOPOLOGIES[DEVICES], tmp_path).places)
    assert (seen["nodes"], seen["iommu"]) == ("0-1", True)


@pytest.mark.parametrize("name", EXPECTED)
def test_what_it_is(name: str, by_name: dict[str, Any]) -> None:
    device = by_name[name]
    largest = max(bar["size_bytes"] for bar in device["bars"] if not bar["io"])
    ids = f"{device['vendor_id']}:{device['device_id']}"
    found = (ids, device["kind"], device["numa_node"], largest, " ".join(device["reset_methods"]))
    assert found == EXPECTED[name]


def test_an_h100_by_its_name_and_link(by_name: dict[str, Any]) -> None:
    gpu = by_name["gpu3"]
    assert "H100" in gpu["name"]
    assert (gpu["link"]["speed"], gpu["link"]["width"]) == ("32.0 GT/s PCIe", 16)
    assert {bar["index"]: bar["size_bytes"] for bar in gpu["bars"]} == {
        0: 16 << 20,
        2: 128 * GIB,
        4: 32 << 20,
    }
    assert gpu["root_bus"] == "pci0000:80"


def test_each_gpu_is_in_a_group_of_its_own_and_may_be_given(by_name: dict[str, Any], seen: Any) -> None:
    gpus = [by_name[f"gpu{number}"] for number in range(4)]
    assert len({gpu["iommu_group"] for gpu in gpus}) == 4
    for gpu in gpus:
        assert gpu["group_members"] == [gpu["address"]]
        assert (gpu["state"], gpu["findings"], gpu["driver"]) == ("ready", [], None)
    assert (seen["one"]["code"], seen["one"]["said"]["given"]) == (0, True)


def test_functions_of_a_card_go_together(by_name: dict[str, Any]) -> None:
    card, audio = by_name["a6000"], by_name["a6000-audio"]
    assert card["siblings"] == [audio["address"]]
    assert card["iommu_group"] == audio["iommu_group"]


def test_what_shares_a_conventional_bus_shares_a_group(by_name: dict[str, Any], seen: Any) -> None:
    first, second = by_name["edu1"], by_name["edu2"]
    assert first["iommu_group"] == second["iommu_group"]
    assert codes(first["findings"], first["address"]) == {"group-shared", "acs-missing"}
    # Who is given the one has the other, too, which nothing resets.
    assert "no-reset" in codes(first["findings"], second["address"])
    assert (first["state"], seen["shared"]["said"]["given"]) == ("refused", False)


def test_below_a_switch_without_acs_nothing_may_be_given(by_name: dict[str, Any], seen: Any) -> None:
    for name in ("edu3", "nvme1"):
        assert by_name[name]["state"] == "refused"
        assert "switch-acs" in codes(seen["audit"]["said"]["findings"], by_name[name]["address"])


def test_a_network_card_can_have_vfs(by_name: dict[str, Any]) -> None:
    assert by_name["nic0"]["sriov"]["total_vfs"] == 7
    assert by_name["nic0"]["driver"] == "igb"


def test_the_host_itself_is_in_order(seen: Any) -> None:
    assert seen["list"]["said"]["host"] == []
    assert [each for each in seen["audit"]["said"]["findings"] if each["subject"] is None] == []
