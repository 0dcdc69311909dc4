"""NVIDIA's driver in a guest: what is loaded, made and initialised, and what a container gets of it."""

import asyncio
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import boot, nvidia, nvidiacdi, passthrough, threads
from agent.passthrough import Passthrough
from rpc.api.agent import GivenDevice, PciDevice
from rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from tests.unit.agent.waiting import until
from tests.unit.rpc.wires import pass_time

VERSION = "550.163.01"
FIRST, SECOND = "0000:02:00.0", "0000:03:00.0"
A = PciDevice(name="0000:3b:00.0", port="00:06.0", function=0, kind="gpu")
B = PciDevice(name="0000:86:00.0", port="00:06.1", function=0, kind="gpu")
LIBRARIES = nvidiacdi.LIBRARIES.lstrip("/")
LIMIT_S = 10.0
PROCESS = {"env": ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=all"]}


class Guest:
    """The files of a guest with the driver and two GPUs; what the kernel and the driver do to them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.numbers: dict[str, tuple[int, int, int]] = {}
        for directory in ("dev", "proc/driver/nvidia", f"{LIBRARIES}", "usr/bin", "sys/bus/pci/devices"):
            (root / directory).mkdir(parents=True)
        (root / "proc/devices").write_text(
            "Character devices:\n  1 mem\n237 nvidia-uvm\n238 nvidia-caps\n\nBlock devices:\n237 x\n"
        )
        for name in ("libcuda", "libnvidia-ml"):
            (root / LIBRARIES / f"{name}.so.{VERSION}").write_text("")
            (root / LIBRARIES / f"{name}.so.1").symlink_to(f"{name}.so.{VERSION}")
        (root / LIBRARIES / "libc.so.6").write_text("")
        (root / "usr/bin/nvidia-smi").write_text("")
        firmware = root / "usr/lib/firmware/nvidia" / VERSION
        firmware.mkdir(parents=True)
        (firmware / "gsp_ga10x.bin").write_text("")
        (root / "lib").symlink_to("usr/lib")
        self._plug(FIRST, "00:06.0")
        self._plug(SECOND, "00:06.1")

    def _plug(self, address: str, port: str) -> None:
        at = self.root / f"sys/devices/pci0000:00/0000:{port}" / address
        at.mkdir(parents=True)
        (at / "vendor").write_text("0x10de\n")
        (at / "modalias").write_text("pci:v000010DEd00002330\n")
        for directory in (at, at.parent):
            (self.root / "sys/bus/pci/devices" / directory.name).symlink_to(directory)

    def take(self, address: str, minor: int) -> None:
        """As the driver does with a GPU that it knows."""
        directory = self.root / "proc/driver/nvidia/gpus" / address
        directory.mkdir(parents=True)
        (directory / "information").write_text(f"Model: \t\t NVIDIA H100\nDevice Minor: \t {minor}\n")

    def mknod(self, path: str, mode: int, number: int) -> None:
        if os.path.exists(path):
            raise FileExistsError(path)
        Path(path).write_text("")
        name = os.path.relpath(path, self.root / "dev")
        self.numbers[name] = (os.major(number), os.minor(number), stat.S_IMODE(mode))


@pytest.fixture
def loaded() -> list[Any]:
    return []


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]) -> Guest:
    guest = Guest(tmp_path)

    def load(name: str, options: dict[str, str] | None = None) -> None:
        loaded.append((name, options))
        guest.take(FIRST, 1)
        guest.take(SECOND, 0)

    monkeypatch.setattr(boot, "load_feature", load)
    monkeypatch.setattr(boot, "features", lambda: {"nvidia": []})
    monkeypatch.setattr(boot, "driver_of", lambda modalias: None)
    monkeypatch.setattr(os, "mknod", guest.mknod)
    kmsg = tmp_path / "kmsg"
    kmsg.write_text("")
    monkeypatch.setattr(passthrough, "KMSG", str(kmsg))
    return guest


def come_up(guest: Guest, *devices: PciDevice) -> tuple[Passthrough, list[Any]]:
    found = Passthrough(str(guest.root / "sys"), str(guest.root))
    return found, asyncio.run(found.come_up(devices, LIMIT_S))


async def come_up_without_the_first(guest: Guest) -> list[Any]:
    """As if all the time that they have had passed once the second is up, and that anew which the first has
    because the second has come up."""
    found = Passthrough(str(guest.root / "sys"), str(guest.root))
    coming = asyncio.create_task(found.come_up([A, B], LIMIT_S))
    await until(lambda: SECOND in found._gpus)
    while not coming.done():
        pass_time(LIMIT_S)
        await asyncio.wait([coming], timeout=0.05)
    return await coming


def spec() -> dict[str, Any]:
    return {"process": {"env": list(PROCESS["env"])}, "root": {"path": "/run/root"}}


def test_nothing_of_it_is_imported_for_others() -> None:
    code = "import agent.__main__, agent.passthrough, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "agent.passthrough" in imported
    assert not {name for name in imported if "nvidia" in name or "cdi" in name.split(".")[-1]}


# --- coming up ---


def test_the_driver_is_loaded_once_and_makes_no_nodes_itself(guest: Guest, loaded: list[Any]) -> None:
    _, found = come_up(guest, A, B)
    assert [each.problem for each in found] == ["", ""]
    assert loaded == [("nvidia", {"nvidia": "NVreg_ModifyDeviceFiles=0"})]


def test_nodes_have_the_drivers_numbers(guest: Guest) -> None:
    _, found = come_up(guest, A, B)
    assert guest.numbers == {
        "nvidiactl": (195, 255, 0o666),
        "nvidia-modeset": (195, 254, 0o666),
        "nvidia-uvm": (237, 0, 0o666),
        "nvidia-uvm-tools": (237, 1, 0o666),
        "nvidia0": (195, 0, 0o666),
        "nvidia1": (195, 1, 0o666),
    }
    assert [each.nodes for each in found] == [["nvidia1"], ["nvidia0"]]


def test_what_divides_gpus_has_a_node_of_the_mode_that_the_driver_says(guest: Guest) -> None:
    directory = guest.root / "proc/driver/nvidia/capabilities/mig"
    directory.mkdir(parents=True)
    for name, minor, mode in (("config", 1, 0o400), ("monitor", 2, 0o444)):
        text = f"DeviceFileMinor: {minor}\nDeviceFileMode: {mode}\nDeviceFileModify: 1\n"
        (directory / name).write_text(text)
    come_up(guest, A)
    assert guest.numbers["nvidia-caps/nvidia-cap1"] == (238, 1, 0o400)
    assert guest.numbers["nvidia-caps/nvidia-cap2"] == (238, 2, 0o444)


def test_a_gpu_is_initialised_and_stays_open(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[str] = []
    driver = nvidia.Driver(str(guest.root))
    at = str(guest.root / "sys/bus/pci/devices" / FIRST)

    async def scenario() -> None:
        await driver.come_up(at, LIMIT_S)
        links = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _open(name)]
        held.extend(links)

    asyncio.run(scenario())
    assert str(guest.root / "dev/nvidia1") in held


def _open(name: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{name}")


def test_one_that_cannot_be_initialised_says_so_and_the_other_is_fine(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, wanted = os.open, str(guest.root / "dev/nvidia1")

    def refuse(path: Any, *arguments: Any, **keywords: Any) -> int:
        if path == wanted:
            raise OSError(5, "Input/output error", path)
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(passthrough, "kernel_words", lambda *about: [f"said of {about}"])
    found, (first, second) = come_up(guest, A, B)
    assert first.problem.startswith(f"GPU {FIRST} cannot be initialised")
    assert "Input/output error" in first.problem
    assert first.words == [f"said of {((FIRST, 'NVRM'), [SECOND[:-2]])}"]
    assert (second.problem, second.nodes) == ("", ["nvidia0"])
    with pytest.raises(NotFound, match="not in this guest"):
        found.add(spec(), [GivenDevice(name="0000:77:00.0")])


def test_one_that_takes_too_long_says_so(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = guest.root / "dev/nvidia1"
    os.mkfifo(stuck)
    monkeypatch.setattr(os, "O_RDWR", os.O_WRONLY)  # of a FIFO, that waits for a reader
    started: list[threading.Thread] = []

    def start(function: Callable[[], None], _: tuple[()]) -> None:
        started.append(threading.Thread(target=function))
        started[-1].start()

    monkeypatch.setattr(threads, "start_new_thread", start)

    async def scenario() -> list[Any]:
        seen = await come_up_without_the_first(guest)
        reader = os.open(stuck, os.O_RDONLY | os.O_NONBLOCK)
        for thread in started:  # which tell the loop when they are done, whoever waits
            await asyncio.to_thread(thread.join)
        os.close(reader)
        return seen

    first, second = asyncio.run(scenario())
    assert first.problem == f"GPU {FIRST}: it was not initialised within 10 s"
    assert second.problem == ""


def test_one_that_waits_for_another_has_its_time_once_that_is_up(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the driver initialises one after the other, all of them move."""
    real, limit_s = os.open, 1000.0
    turns = {str(guest.root / f"dev/nvidia{minor}"): threading.Event() for minor in (0, 1)}

    def wait_for_its_turn(path: Any, *arguments: Any, **keywords: Any) -> int:
        if path in turns:
            turns[path].wait()
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", wait_for_its_turn)
    second, first = turns.values()

    async def scenario() -> list[Any]:
        found = Passthrough(str(guest.root / "sys"), str(guest.root))
        coming = asyncio.create_task(found.come_up([A, B], limit_s))
        await until(lambda: len(guest.numbers) == 6)
        pass_time(0.6 * limit_s)
        second.set()
        await until(lambda: SECOND in found._gpus)
        pass_time(0.6 * limit_s)
        await asyncio.wait([coming], timeout=0.05)  # the loop has seen what time it is
        first.set()
        return await coming

    try:
        assert [each.problem for each in asyncio.run(scenario())] == ["", ""]
    finally:
        for turn in turns.values():
            turn.set()


def test_a_gpu_that_the_driver_does_not_take_is_named(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "load_feature", lambda name, options: guest.take(SECOND, 0))
    first, second = asyncio.run(come_up_without_the_first(guest))
    assert first.problem == f"GPU {FIRST}: the driver did not take it within 10 s"
    assert second.problem == ""


def test_a_driver_that_cannot_be_loaded_is_each_gpus_problem(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, options: dict[str, str]) -> None:
        raise FailedPrecondition("kernel module nvidia.ko cannot be loaded", "No such device")

    monkeypatch.setattr(boot, "load_feature", fail)
    _, found = come_up(guest, A, B)
    assert all("nvidia.ko cannot be loaded" in each.problem for each in found)


def test_a_guest_without_the_driver_has_the_device_as_it_is(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, loaded: list[Any]
) -> None:
    monkeypatch.setattr(boot, "features", dict)
    found, (gpu,) = come_up(guest, A)
    assert (gpu.problem, gpu.nodes, loaded) == ("", [], [])
    what = spec()
    found.add(what, [GivenDevice(name=A.name)])
    assert what["linux"]["devices"] == []


def test_another_makers_gpu_is_not_the_drivers(guest: Guest, loaded: list[Any]) -> None:
    (guest.root / "sys/bus/pci/devices" / FIRST / "vendor").write_text("0x1002\n")
    come_up(guest, A)
    assert loaded == []


# --- in a container ---


@pytest.fixture
def given(guest: Guest) -> dict[str, Any]:
    found, _ = come_up(guest, A, B)
    what = spec()
    found.add(what, [GivenDevice(name=A.name, mode=0o660)])
    return what


def test_a_container_has_its_gpu_and_what_all_share(given: dict[str, Any]) -> None:
    devices = [each["path"] for each in given["linux"]["devices"]]
    shared = ["/dev/nvidia-modeset", "/dev/nvidia-uvm-tools", "/dev/nvidia-uvm", "/dev/nvidiactl"]
    assert devices == ["/dev/nvidia1", *shared]
    rules = given["linux"]["resources"]["devices"]
    assert len(rules) == len(devices)
    assert all(rule["allow"] and rule["access"] == "rwm" for rule in rules)


def test_it_has_the_libraries_programs_and_firmware_read_only(given: dict[str, Any]) -> None:
    assert [each["source"] for each in given["mounts"]] == [
        f"/{LIBRARIES}/libcuda.so.{VERSION}",
        f"/{LIBRARIES}/libnvidia-ml.so.{VERSION}",
        f"/lib/firmware/nvidia/{VERSION}/gsp_ga10x.bin",
        "/usr/bin/nvidia-smi",
    ]
    for mount in given["mounts"]:
        assert mount["destination"] == mount["source"]
        assert {"ro", "nosuid", "nodev", "rbind"} <= set(mount["options"])


def test_its_environment_says_that_it_is_seen_to(given: dict[str, Any]) -> None:
    assert given["process"]["env"][:2] == ["PATH=/bin", "NVIDIA_VISIBLE_DEVICES=void"]


def test_one_hook_makes_links_and_the_loaders_cache(given: dict[str, Any]) -> None:
    ((hook,),) = given["hooks"].values()
    assert list(given["hooks"]) == ["createContainer"]
    assert hook["path"] == hook["args"][0] == "/usr/bin/python3"
    words = hook["args"][4:]
    assert words[:2] == [f"--driver={VERSION}", f"--folder=/{LIBRARIES}"]
    assert f"--link=libcuda.so.{VERSION}::/{LIBRARIES}/libcuda.so.1" in words
    assert f"--link=libcuda.so.1::/{LIBRARIES}/libcuda.so" in words
    assert words[-1] == "--root=/run/root"


def test_a_root_that_is_to_be_read_only_is_made_so_by_the_hook(guest: Guest) -> None:
    found, _ = come_up(guest, A)
    what = spec()
    what["root"]["readonly"] = True
    found.add(what, [GivenDevice(name=A.name)])
    assert what["root"] == {"path": "/run/root", "readonly": False}
    assert what["hooks"]["createContainer"][0]["args"][-1] == "--readonly"


def test_what_the_container_mounts_itself_stays(guest: Guest) -> None:
    found, _ = come_up(guest, A)
    what = spec()
    what["mounts"] = [{"destination": "/usr/bin/nvidia-smi", "source": "/mine", "type": "bind"}]
    found.add(what, [GivenDevice(name=A.name)])
    mounts = [each["source"] for each in what["mounts"] if each["destination"] == "/usr/bin/nvidia-smi"]
    assert mounts == ["/mine"]


def test_a_path_of_its_own_is_refused_because_libraries_would_not_look_there(guest: Guest) -> None:
    found, _ = come_up(guest, A)
    with pytest.raises(InvalidArgument, match="libraries look for it at /dev/nvidia1"):
        found.add(spec(), [GivenDevice(name=A.name, path="/dev/gpu")])
    found.add(spec(), [GivenDevice(name=A.name, path="/dev/nvidia1")])


def test_a_specification_names_gpus_by_their_order(guest: Guest) -> None:
    come_up(guest, A, B)
    made = nvidiacdi.specification([1, 0], str(guest.root))
    nodes = {
        each["name"]: [node["path"] for node in each["containerEdits"]["deviceNodes"]]
        for each in made["devices"]
    }
    assert nodes == {"0": ["/dev/nvidia0"], "1": ["/dev/nvidia1"], "all": ["/dev/nvidia0", "/dev/nvidia1"]}
    assert (made["kind"], made["cdiVersion"]) == ("nvidia.com/gpu", "0.5.0")


def test_a_guest_without_a_driver_has_no_specification(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no NVIDIA driver"):
        nvidiacdi.specification([0], str(tmp_path))
