"""The host's devices as a guest has them: found behind their ports, waited for, nodes in a container."""

import asyncio
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent import boot, network, passthrough
from agent.passthrough import Passthrough, kernel_words
from rpc.api.agent import GivenDevice, PciDevice
from rpc.errors import NotFound
from tests.unit.agent.waiting import until
from tests.unit.rpc.wires import pass_time

NVME = PciDevice(name="0000:3b:00.0", port="00:06.0", function=0, kind="nvme")
GPU = PciDevice(name="0000:3c:00.0", port="00:06.1", function=0, kind="gpu")
CARD = PciDevice(name="0000:5e:10.0", port="00:06.2", function=0, kind="nic")
SOUND = PciDevice(name="0000:3c:00.1", port="00:06.1", function=1, kind="audio")


class Guest:
    """sysfs of a guest with two root ports in use."""

    def __init__(self, root: Path) -> None:
        self.sys = root
        self.root = root / "devices/pci0000:00"
        self.loaded: list[str] = []
        self.drivers = root.with_name("drivers.txt")
        (root / "bus/pci/devices").mkdir(parents=True)
        for name in ("block", "nvme", "drm"):
            (root / "class" / name).mkdir(parents=True)

    def function(self, port: str, address: str, driver: str = "") -> Path:
        at = self.root / f"0000:{port}" / address
        at.mkdir(parents=True)
        (at / "modalias").write_text("pci:v00000000d00000000\n")
        for directory in (at, at.parent):
            link = self.sys / "bus/pci/devices" / directory.name
            if not link.is_symlink():
                link.symlink_to(directory)
        if driver:
            (self.sys / "bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
            (at / "driver").symlink_to(self.sys / "bus/pci/drivers" / driver)
        return at

    def node(self, directory: Path, subsystem: str, name: str, major: int, minor: int) -> None:
        directory.mkdir(parents=True)
        (directory / "dev").write_text(f"{major}:{minor}\n")
        (directory / "uevent").write_text(f"MAJOR={major}\nMINOR={minor}\nDEVNAME={name}\n")
        (directory / "subsystem").symlink_to(self.sys / "class" / subsystem)
        if subsystem == "block":
            (self.sys / "class/block" / directory.name).symlink_to(directory)

    def nvme(self, at: Path) -> None:
        controller = at / "nvme/nvme0"
        self.node(controller, "nvme", "nvme0", 240, 0)
        self.node(controller / "nvme0n1", "block", "nvme0n1", 259, 0)
        self.node(controller / "nvme0n1/nvme0n1p1", "block", "nvme0n1p1", 259, 1)


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    made = Guest(tmp_path / "sys")
    made.drivers.write_text("")
    monkeypatch.setattr(boot, "load_feature", made.loaded.append)
    monkeypatch.setattr(boot, "driver_of", partial(boot.driver_of, list_path=str(made.drivers)))
    monkeypatch.setattr(boot, "features", dict)
    kmsg = tmp_path / "kmsg"
    kmsg.write_text("")
    monkeypatch.setattr(passthrough, "KMSG", str(kmsg))
    return made


def come_up(guest: Guest, *devices: PciDevice, limit_s: float = 10.0) -> tuple[Passthrough, list[Any]]:
    found = Passthrough(str(guest.sys), str(guest.sys.parent))
    return found, asyncio.run(found.come_up(devices, limit_s))


def test_each_is_found_by_its_port_whatever_the_buses_are_called(guest: Guest) -> None:
    guest.nvme(guest.function("00:06.0", "0000:02:00.0", "nvme"))
    guest.function("00:06.1", "0000:03:00.0", "nouveau")
    guest.function("00:06.1", "0000:03:00.1")
    _, (nvme, gpu, sound) = come_up(guest, NVME, GPU, SOUND)
    assert (nvme.name, nvme.address, nvme.driver, nvme.problem) == (NVME.name, "0000:02:00.0", "nvme", "")
    assert nvme.nodes == ["nvme0n1", "nvme0n1p1", "nvme0"]
    assert (gpu.address, gpu.driver, gpu.nodes, gpu.problem) == ("0000:03:00.0", "nouveau", [], "")
    assert (sound.address, sound.driver, sound.problem) == ("0000:03:00.1", "", "")


def test_one_that_is_not_there_does_not_hold_up_the_others(guest: Guest) -> None:
    guest.function("00:06.1", "0000:03:00.0")
    _, (nvme, gpu) = come_up(guest, NVME, GPU, limit_s=0.2)
    assert nvme.problem == "no device behind root port 00:06.0 appeared within 0.2 s"
    assert (nvme.address, nvme.nodes) == ("", [])
    assert (gpu.address, gpu.problem) == ("0000:03:00.0", "")


def test_each_is_said_on_the_console_as_soon_as_it_is_known(guest: Guest) -> None:
    """Not when the last is: that may take as long as it is let."""
    guest.nvme(guest.function("00:06.0", "0000:02:00.0", "nvme"))
    lines: list[str] = []
    seconds = re.compile(r"after \d+\.\d s")

    async def scenario() -> list[Any]:
        found = Passthrough(str(guest.sys), str(guest.sys.parent), lines.append)
        coming = asyncio.create_task(found.come_up([GPU, NVME], 1000.0))
        await until(lambda: lines)
        assert not coming.done()
        assert [seconds.sub("then", line) for line in lines] == [
            "casemate agent: device 0000:3b:00.0, 0000:02:00.0, then: nvme nvme0n1 nvme0n1p1 nvme0"
        ]
        pass_time(1000.0)
        return await coming

    gpu, nvme = asyncio.run(scenario())
    assert (bool(gpu.problem), nvme.problem) == (True, "")
    assert seconds.sub("then", lines[1]) == (
        "casemate agent: device 0000:3c:00.0, then: it did not come up: "
        "no device behind root port 00:06.1 appeared within 1000 s"
    )


def near(device: PciDevice, node: int) -> PciDevice:
    return PciDevice(
        name=device.name, port=device.port, function=device.function, kind=device.kind, node=node
    )


def test_each_is_on_its_numa_node_before_a_driver_takes_it(guest: Guest) -> None:
    """Where a root bus does not say so already."""
    nvme = guest.function("00:06.0", "0000:02:00.0", "nvme")
    guest.nvme(nvme)
    gpu, sound = (guest.function("00:06.1", f"0000:03:00.{number}") for number in (0, 1))
    for at in (nvme, gpu, sound):
        (at / "numa_node").write_text("-1\n")
    come_up(guest, near(NVME, 1), near(GPU, 0), near(SOUND, -1))
    assert [(at / "numa_node").read_text() for at in (nvme, gpu, sound)] == ["1", "0", "-1\n"]
    (gpu / "numa_node").write_text("0\n")
    come_up(guest, near(GPU, 0))
    assert (gpu / "numa_node").read_text() == "0\n"  # not written: it was


def test_an_nvme_without_a_namespace_says_so_with_the_kernels_words(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest.function("00:06.0", "0000:02:00.0", "nvme")
    monkeypatch.setattr(passthrough, "kernel_words", lambda about, *_: [f"said of {' '.join(about)}"])
    _, (nvme,) = come_up(guest, NVME, limit_s=0.2)
    assert nvme.problem == "no namespace of the NVMe appeared within 0.2 s"
    assert nvme.words == ["said of 0000:02:00.0"]
    assert nvme.driver == "nvme"


def test_a_kernel_without_the_driver_says_so(guest: Guest) -> None:
    guest.function("00:06.0", "0000:02:00.0")
    guest.function("00:06.2", "0000:04:00.0")
    named = PciDevice(name=CARD.name, port=CARD.port, function=0, kind="nic", interface="net1")
    _, found = come_up(guest, NVME, named, CARD)
    lacks = "this guest image's kernel has no driver for it"
    assert [each.problem for each in found] == [lacks, lacks, ""]


def test_the_images_driver_for_a_device_is_loaded_unless_one_has_taken_it(guest: Guest) -> None:
    (guest.function("00:06.0", "0000:02:00.0", "other") / "modalias").write_text("pci:v0000AAAAd00000001sv\n")
    (guest.function("00:06.1", "0000:03:00.0") / "modalias").write_text("pci:v0000AAAAd00000001sv\n")
    (guest.function("00:06.2", "0000:04:00.0") / "modalias").write_text("pci:v0000BBBBd00000001sv\n")
    guest.drivers.write_text("pci:v*d00000002* no\npci:v0000AAAAd*sv* right\npci:v*d* late\n")
    come_up(guest, NVME, limit_s=0.1)
    assert guest.loaded == []
    come_up(guest, GPU)
    assert guest.loaded == ["right"]
    come_up(guest, CARD)
    assert guest.loaded == ["right", "late"]


def test_a_network_card_is_set_up_once_it_has_an_interface(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel then makes of it is shown in the test bed."""
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(network, "set_up_card", lambda name, wanted: asked.append((name, wanted.name)))
    at = guest.function("00:06.2", "0000:04:00.0", "igbvf")
    _, (card,) = come_up(guest, CARD, limit_s=0.1)
    assert card.problem == "no interface of the network card appeared within 0.1 s"
    (at / "net/eth1").mkdir(parents=True)
    _, (card,) = come_up(guest, CARD)
    assert (card.problem, card.driver, card.interfaces) == ("", "igbvf", ["eth1"])
    assert asked == [("eth1", CARD.name)]


def mellanox(guest: Guest, port: str, address: str, number: int, title: str = "") -> Path:
    """A card that mlx5's drivers have taken. title: of its interface; one of InfiniBand has none."""
    at = guest.function(port, address, "mlx5_core")
    (at / "class").write_text("0x020000\n" if title else "0x020700\n")
    (at / f"infiniband/mlx5_{number}").mkdir(parents=True)
    uverbs = f"uverbs{number}"
    guest.node(
        at / "infiniband_verbs" / uverbs, "infiniband_verbs", f"infiniband/{uverbs}", 231, 192 + number
    )
    if title:
        (at / "net" / title).mkdir(parents=True)
    return at


@pytest.fixture
def rdma(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Guest:
    """A guest with the drivers, of which rdma_ucm has made its node."""
    guest.node(guest.sys / "class/misc/rdma_cm", "misc", "infiniband/rdma_cm", 10, 120)
    monkeypatch.setattr(boot, "features", lambda: {"mlx5-rdma": []})
    monkeypatch.setattr(network, "set_up_card", lambda name, _: name)
    return guest


def test_a_cards_rdma_devices_are_with_its_interface(rdma: Guest) -> None:
    mellanox(rdma, "00:06.2", "0000:04:00.0", 0, "eth1")
    mellanox(rdma, "00:06.1", "0000:05:00.0", 1, "eth2")
    other = PciDevice(name="0000:5e:10.1", port="00:06.1", function=0, kind="nic")
    passed, (card, second) = come_up(rdma, CARD, other)
    assert rdma.loaded == ["mlx5-rdma", "mlx5-rdma"]
    assert (card.interfaces, card.nodes, card.problem) == (["eth1"], ["infiniband/uverbs0"], "")
    assert (second.interfaces, second.nodes) == (["eth2"], ["infiniband/uverbs1"])
    spec: dict[str, Any] = {}
    passed.add(spec, [GivenDevice(name=each.name, mode=0o666) for each in (CARD, other)])
    paths = [each["path"] for each in spec["linux"]["devices"]]
    # the node for connections is one for both
    assert paths == ["/dev/infiniband/uverbs0", "/dev/infiniband/rdma_cm", "/dev/infiniband/uverbs1"]
    assert {(each["major"], each["minor"]) for each in spec["linux"]["resources"]["devices"]} == {
        (231, 192),
        (231, 193),
        (10, 120),
    }


def test_a_card_of_infiniband_has_no_interface_and_is_not_waited_for_until_one_comes(rdma: Guest) -> None:
    mellanox(rdma, "00:06.2", "0000:04:00.0", 0)
    _, (card,) = come_up(rdma, CARD, limit_s=0.5)
    assert (card.interfaces, card.nodes, card.problem) == ([], ["infiniband/uverbs0"], "")


def test_an_image_without_the_drivers_of_rdma_has_the_interface(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = guest.function("00:06.2", "0000:04:00.0", "mlx5_core")
    (at / "net/eth1").mkdir(parents=True)
    monkeypatch.setattr(network, "set_up_card", lambda name, _: name)
    _, (card,) = come_up(guest, CARD)
    assert (guest.loaded, card.interfaces, card.problem) == ([], ["eth1"], "")


def test_of_several_ways_to_a_disk_it_is_the_disk(guest: Guest) -> None:
    at = guest.function("00:06.0", "0000:02:00.0", "nvme")
    (at / "nvme/nvme0/nvme0c0n1").mkdir(parents=True)
    head = guest.sys / "devices/virtual/nvme-subsystem/nvme-subsys0/nvme0n1"
    guest.node(head, "block", "nvme0n1", 259, 0)
    _, (nvme,) = come_up(guest, NVME)
    assert (nvme.nodes, nvme.problem) == (["nvme0n1"], "")


# --- addresses for its memory ---

# As the kernel has them in `resource`: from, to, flags. Of 64 bits, one takes the place of two.
MEM, WIDE, PORTS, NOTHING = 0x40200, 0x14220C, 0x40101, (0, 0, 0)
UNSET = 0x2000_0000
GIVEN = (0xFE00_0000, 0xFEFF_FFFF, MEM)


def resources(guest: Guest, at: Path, *lines: tuple[int, int, int], done: bool = True) -> None:
    """done: the kernel has tried to give it all that it takes."""
    whole = [*lines, *[NOTHING] * (17 - len(lines))]
    (at / "resource").write_text("".join(" ".join(f"{n:#018x}" for n in line) + "\n" for line in whole))
    _, bus, place = at.name.split(":")
    if done:
        known = guest.sys.parent / "proc/bus/pci" / bus / place
        known.parent.mkdir(parents=True, exist_ok=True)
        known.touch()


@pytest.mark.parametrize(
    "line",
    [
        (0, (128 << 30) - 1, WIDE),
        (0, (128 << 30) - 1, WIDE | UNSET),
        (1 << 40, (129 << 30) + (1 << 40), UNSET | WIDE),
    ],
    ids=["nowhere", "unset", "unset-somewhere"],
)
def test_a_device_whose_memory_has_no_addresses_fails_by_its_name(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, line: tuple[int, int, int]
) -> None:
    """A generic one would otherwise be taken for what its driver makes of it: nothing."""
    monkeypatch.setattr(passthrough, "kernel_words", lambda about, *_: [f"said of {' '.join(about)}"])
    resources(guest, guest.function("00:06.1", "0000:03:00.0"), GIVEN, NOTHING, line)
    resources(guest, guest.function("00:06.0", "0000:02:00.0"), GIVEN)
    _, (gpu, other) = come_up(guest, GPU, PciDevice(name="other", port="00:06.0", function=0))
    assert gpu.problem.startswith("the guest's kernel has no room for BAR 2 (12")
    assert "GiB)" in gpu.problem
    assert gpu.words == ["said of 0000:03:00.0"]
    assert guest.loaded == []  # no driver gets it
    assert other.problem == ""


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("BAR 2: no space for [mem size 0x2000000000 64bit pref]",), "BAR 2"),
        (("BAR 2: failed to assign [mem size 0x2000000000 64bit pref]",), "BAR 2"),
        (
            (
                # Debian's 6.12, whose CPU has 40 bits of addresses, of a BAR of 1 TiB
                "BAR 0 [mem 0xfe800000-0xfe8000ff]",
                "BAR 2 [mem 0x10000000000-0x1ffffffffff 64bit pref]",
                "BAR 2 [mem size 0x10000000000 64bit pref]: can't assign; no space",
                "BAR 2 [mem 0x10000000000-0x1ffffffffff 64bit pref]: failed to assign",
            ),
            "BAR 2",
        ),
        (
            (
                "BAR 2 [mem size 0x2000000000 64bit pref]: failed to assign",
                "BAR 2 [mem 0x2000000000-0x3fffffffff 64bit pref]: assigned",
            ),
            "",
        ),
        (("BAR 5 [io  size 0x0080]: failed to assign",), ""),
        (("BAR 13 [mem size 0x2000000000 64bit pref]: failed to assign",), ""),
    ],
    ids=["6.1", "6.1-failed", "6.12", "second-try", "ports", "a-bridges"],
)
def test_one_that_the_kernel_has_forgotten_is_known_by_its_words(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], problem: str
) -> None:
    """Older ones leave a line of zeros, as that of a BAR that is not there."""
    lines = [f"pci 0000:03:00.0: {line}" for line in words]
    monkeypatch.setattr(
        passthrough, "kernel_words", lambda about, *_: lines if about == ("0000:03:00.0",) else []
    )
    resources(guest, guest.function("00:06.1", "0000:03:00.0"), GIVEN)
    _, (gpu,) = come_up(guest, GPU)
    assert gpu.problem == (f"the guest's kernel has no room for {problem}" if problem else "")
    if problem:
        assert gpu.words == lines


def test_one_with_all_of_its_memory_is_up_whatever_else_it_lacks(guest: Guest) -> None:
    """Ports, a ROM, and what its virtual functions would take are nothing to its driver."""
    at = guest.function("00:06.1", "0000:03:00.0")
    rom, of_vfs = (0, 0x7FFFF, 0x46200), (0, 0xFFFF, WIDE | UNSET)
    resources(guest, at, GIVEN, (0, 0x7F, PORTS | UNSET), *[NOTHING] * 4, rom, of_vfs)
    _, (gpu,) = come_up(guest, GPU)
    assert gpu.problem == ""


def test_one_that_the_kernel_still_sets_up_is_not_judged(guest: Guest) -> None:
    """One that is plugged in is in sysfs before it has its addresses."""
    at = guest.function("00:06.1", "0000:03:00.0")
    resources(guest, at, (0, 0xFFFFFF, MEM), done=False)
    _, (gpu,) = come_up(guest, GPU)
    assert gpu.problem == ""


# --- in a container ---


def test_a_container_gets_all_nodes_with_the_guests_numbers(guest: Guest) -> None:
    guest.nvme(guest.function("00:06.0", "0000:02:00.0", "nvme"))
    found, _ = come_up(guest, NVME)
    spec: dict[str, Any] = {"linux": {"resources": {"devices": [{"allow": False, "access": "rwm"}]}}}
    found.add(spec, [GivenDevice(name=NVME.name, path="/dev/data", mode=0o640, uid=5, gid=6)])
    entries = spec["linux"]["devices"]
    assert entries[0] == {
        "path": "/dev/data",
        "type": "b",
        "major": 259,
        "minor": 0,
        "fileMode": 0o640,
        "uid": 5,
        "gid": 6,
    }
    assert [entry["path"] for entry in entries[1:]] == ["/dev/nvme0n1p1", "/dev/nvme0"]
    assert [entry["type"] for entry in entries] == ["b", "b", "c"]
    rules = spec["linux"]["resources"]["devices"]
    assert rules[1] == {"allow": True, "access": "rwm", "type": "b", "major": 259, "minor": 0}
    assert len(rules) == 4


def test_of_a_container_with_a_user_namespace_the_nodes_are_its_roots(guest: Guest) -> None:
    """Whoever is root there has no power over a node of nobody's."""
    guest.nvme(guest.function("00:06.0", "0000:02:00.0", "nvme"))
    passed, _ = come_up(guest, NVME)
    line = {"containerID": 0, "hostID": 100000, "size": 65536}
    spec: dict[str, Any] = {
        "linux": {"namespaces": [{"type": "user"}], "uidMappings": [line], "gidMappings": [line]}
    }
    passed.add(spec, [GivenDevice(name=NVME.name, mode=0o660)])
    assert {(each["uid"], each["gid"]) for each in spec["linux"]["devices"]} == {(100000, 100000)}
    others: dict[str, Any] = {"linux": {**spec["linux"], "devices": []}}
    passed.add(others, [GivenDevice(name=NVME.name, mode=0o660, uid=100007, gid=5)])
    assert {(each["uid"], each["gid"]) for each in others["linux"]["devices"]} == {(100007, 5)}


def test_a_device_without_nodes_is_its_entry_in_sysfs_and_has_no_path(guest: Guest) -> None:
    guest.function("00:06.1", "0000:03:00.0")
    found, _ = come_up(guest, GPU)
    spec: dict[str, Any] = {}
    found.add(spec, [GivenDevice(name=GPU.name)])
    assert spec["linux"]["devices"] == []
    with pytest.raises(NotFound, match=r"0000:3c:00.0 cannot be at /dev/gpu"):
        found.add({}, [GivenDevice(name=GPU.name, path="/dev/gpu")])


def test_one_that_is_gone_or_was_never_there_is_not_found(guest: Guest) -> None:
    guest.function("00:06.1", "0000:03:00.0")
    found, _ = come_up(guest, GPU)
    (guest.sys / "bus/pci/devices/0000:03:00.0").unlink()
    for name in (GPU.name, "0000:77:00.0"):
        with pytest.raises(NotFound, match=f"{name} is not in this guest"):
            found.add({}, [GivenDevice(name=name)])


def test_the_kernels_words_are_those_about_it(tmp_path: Path) -> None:
    pipe = tmp_path / "kmsg"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writing = os.open(pipe, os.O_WRONLY)
    try:
        os.write(writing, b"6,339,5140900,-;nvme 0000:02:00.0: enabling device\n")
        found = kernel_words(("0000:02:00.0",), path=str(pipe))
        assert found == ["nvme 0000:02:00.0: enabling device"]
        os.write(writing, b"6,340,5140901,-;pci 0000:03:00.0: BAR 0\n")
        assert kernel_words(("0000:02:00.0", ""), path=str(pipe)) == []
        os.write(writing, b"3,341,5140902,-;NVRM: GPU 0000:03:00.0 failed\n")
        assert kernel_words(("NVRM",), ["0000:03:00"], str(pipe)) == []
        os.write(writing, b"3,342,5140903,-;NVRM: GPU 0000:02:00.0\\x0aNVRM: is not supported\n")
        found = kernel_words(("NVRM",), ["0000:03:00"], str(pipe))
        assert found == ["NVRM: GPU 0000:02:00.0", "NVRM: is not supported"]
    finally:
        os.close(reading)
        os.close(writing)
    assert kernel_words(("x",), path=str(tmp_path / "none")) == []
