"""Devices of each kind go to vfio-pci, are used, reset and given back, by a real kernel."""

from typing import Any

import pytest

from tests.testbed.conftest import Look

DEVICES = "gpu-host"
GIB = 1 << 30
RAM_BYTES = 2 << 20  # as inside/giving.py has it
# How each is reset: the best way that works. A card's functions have no bus of their own.
RESETS = {
    **dict.fromkeys(("gpu0", "nvme0", "nic0", "edu0"), "bus"),
    **dict.fromkeys(("a6000", "a6000-audio"), "flr"),
}
NATIVE = {"nvme0": "nvme", "nic0": "igb"}


@pytest.fixture(scope="module")
def seen(look_inside: Look) -> Any:
    return look_inside("gpu_host", DEVICES)["giving"]


@pytest.fixture(scope="module")
def each_kind(seen: Any) -> Any:
    return seen["each_kind"]


def counted(trip: Any, name: str, since: str, until: str) -> dict[str, int]:
    """What came to it between two steps."""
    before, after = trip["counted"][since][name], trip["counted"][until][name]
    return {
        gauge: after[gauge] - before[gauge] for gauge in ("bus_resets", "flrs", "maps", "dmas", "dma_faults")
    }


def test_all_of_a_claim_go_to_vfio_and_back_to_their_drivers(each_kind: Any) -> None:
    assert set(each_kind["claimed"]) == set(RESETS)  # the card's audio function comes along
    native = {name: NATIVE.get(name, "") for name in RESETS}
    assert each_kind["drivers"]["before"] == native
    assert set(each_kind["drivers"]["bound"].values()) == {"vfio-pci"}
    assert each_kind["drivers"]["released"] == native
    assert set(each_kind["states"].values()) == {"free"}
    assert each_kind["failed"] == {}


def test_each_has_its_character_device_and_those_of_a_card_one_group(each_kind: Any) -> None:
    assert set(each_kind["cdevs"].values()) == {True}
    groups = each_kind["groups"]
    assert groups["a6000"] == groups["a6000-audio"]
    assert len(set(groups.values())) == len(groups) - 1


@pytest.mark.parametrize("name", RESETS)
def test_each_is_reset_by_the_best_way_that_works(name: str, each_kind: Any) -> None:
    assert each_kind["resets"][name].split()[0] == RESETS[name]


def test_nothing_is_reset_by_being_bound(each_kind: Any) -> None:
    for gpu in ("gpu0", "a6000", "a6000-audio"):
        assert not any(counted(each_kind, gpu, "before", "bound").values())


def test_a_release_is_one_reset_which_the_device_has_seen(each_kind: Any) -> None:
    for gpu in ("gpu0", "a6000", "a6000-audio"):
        found = counted(each_kind, gpu, "used", "released")
        by_bus = int(RESETS[gpu] == "bus")
        assert (found["bus_resets"], found["flrs"]) == (by_bus, 1 - by_bus)


@pytest.mark.parametrize("way", ["cdev", "group"])
def test_a_gpu_reaches_what_is_mapped_for_it_and_nothing_else(way: str, each_kind: Any) -> None:
    used = each_kind["used"][way]
    assert used["bars"] == [16 << 20, 0, 128 * GIB, 0, 32 << 20, 0]
    assert used["mapped_bytes"] == RAM_BYTES
    assert used["results"] == [1, 1, 2]  # read, written, past the end
    assert (used["came"], used["register"]) == ("tenant", "left")


def test_after_its_use_nothing_is_mapped(each_kind: Any) -> None:
    assert each_kind["counted"]["used"]["gpu0"]["mapped_bytes"] == 0
    assert counted(each_kind, "gpu0", "bound", "used")["dma_faults"] == 2


def test_dma_past_what_is_mapped_is_in_the_kernels_log(each_kind: Any) -> None:
    edu = each_kind["used"]["edu"]
    assert edu["came"] == "data"
    assert any("DMA Write" in line and "fault addr 0x300000" in line for line in edu["faults"])


def test_a_virtual_function_is_given_alone_and_reset_by_itself(seen: Any) -> None:
    found = seen["virtual_functions"]
    assert found["count"] == 2
    assert len(set(found["groups"])) == 3
    assert "vfs-enabled" in found["card"]  # the card itself is nobody's while it has some
    assert found["refused"] == []
    trip = found["trip"]
    assert [trip["drivers"][step]["vf0"] for step in ("before", "bound", "released")] == [
        "igbvf",
        "vfio-pci",
        "igbvf",
    ]
    assert trip["resets"]["vf0"].split()[0] == "flr"
    assert trip["states"] == {"vf0": "free"}


def test_who_shares_a_conventional_bus_comes_along_and_is_not_free_without_a_reset(seen: Any) -> None:
    shared = seen["shared"]
    assert shared["claimed"] == ["edu1", "edu2"]
    assert len(set(shared["groups"].values())) == 1
    assert set(shared["states"].values()) == {"quarantined"}
    assert "knows no way to reset" in shared["failed"]["edu2"]
    assert set(shared["drivers"]["released"].values()) == {"vfio-pci"}


def test_a_link_that_comes_back_narrower_is_a_quarantine(seen: Any) -> None:
    trip = seen["narrow"]
    assert trip["states"] == {"gpu1": "quarantined"}
    assert "link of 8 lanes, was 16" in trip["failed"]["gpu1"]
    found = counted(trip, "gpu1", "used", "released")
    assert (found["bus_resets"], found["flrs"]) == (1, 1)  # every way was tried
    assert trip["drivers"]["released"] == {"gpu1": "vfio-pci"}


def test_one_that_does_not_answer_after_its_reset_is_a_quarantine_in_time(seen: Any) -> None:
    trip = seen["dies"]
    assert trip["states"] == {"gpu2": "quarantined"}
    assert "not done within 6 s" in trip["failed"]["gpu2"]  # Linux itself waits for a minute


@pytest.mark.parametrize("step", ["narrow", "dies"])
def test_a_quarantine_ends_when_a_person_clears_it(step: str, seen: Any) -> None:
    (reason,) = seen[step]["failed"].values()
    assert seen[f"{step}_cleared"] == {"reason": reason, "state": "free", "driver": ""}


def test_one_that_is_taken_out_while_a_pod_has_it_is_a_quarantine(seen: Any) -> None:
    trip = seen["pulled"]
    assert trip["used"] == {"there": False}
    assert trip["states"] == {"gpu3": "quarantined"}
    assert "is not there any more" in trip["failed"]["gpu3"]
