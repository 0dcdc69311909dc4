"""The host's devices in a machine: the way of VFIO's, sizes and limits, what the guest has to say of each."""

import logging
import os
import resource
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from config.load import load
from images.store import ImageStore
from rpc.api import agent as api
from rpc.errors import FailedPrecondition, ResourceExhausted, Unavailable
from shim import system
from shim.paths import PodPaths
from shim.vm import passthrough, setting
from shim.vm.backing import Backing, Cell
from shim.vm.passthrough import IOMMUFD, LEGACY, Access, Function, access_of
from tests.unit.images.fakes import add_image

GIB = 1 << 30
GPU = Function("0000:3b:00.0", "10de H100", "gpu", 12, "vfio3", 0, 0, bar_bytes=128 * GIB + (48 << 20))
NEW = {"qemu": (10, 0), "libvirt": (12, 8)}


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    (tmp_path / "vfio/devices").mkdir(parents=True)
    for name in ("iommu", "vfio/vfio", "vfio/12", "vfio/devices/vfio3"):
        (tmp_path / name).touch()
    return tmp_path


def test_iommufd_where_all_have_it(dev: Path) -> None:
    assert access_of([GPU], (9, 0), (12, 1), str(dev)) == Access(IOMMUFD)
    assert str(Access(IOMMUFD)) == "iommufd"


@pytest.mark.parametrize(
    ("qemu", "libvirt", "why"),
    [
        ((8, 2), (12, 8), "QEMU is 8.2; 9.0 is needed"),
        ((10, 0), (12, 0), "libvirt is 12.0; 12.1 is needed"),
        (None, (12, 8), "QEMU is of a version that is not known; 9.0 is needed"),
        ((10, 0), None, "libvirt is of a version that is not known; 12.1 is needed"),
    ],
)
def test_else_the_legacy_way_and_the_reason(
    dev: Path, qemu: tuple[int, int] | None, libvirt: tuple[int, int] | None, why: str
) -> None:
    found = access_of([GPU], qemu, libvirt, str(dev))
    assert found == Access(LEGACY, why)
    assert str(found) == f"legacy ({why})"


H100, MI300 = replace(GPU, vendor=0x10DE), replace(GPU, vendor=0x1002)


@pytest.mark.parametrize(
    ("functions", "known", "name"),
    [
        ((H100,), {"default", "default-nvidia"}, "default-nvidia"),
        ((H100, replace(GPU, vendor=0x8086, kind="nic")), {"default", "default-nvidia"}, "default-nvidia"),
        ((replace(H100, kind="audio"),), {"default", "default-nvidia"}, "default"),
        ((replace(H100, vendor=0x8086),), {"default", "default-nvidia", "default-amd"}, "default"),
        ((MI300,), {"default", "default-nvidia", "default-amd"}, "default-amd"),
        ((replace(MI300, kind="audio"),), {"default", "default-amd"}, "default"),
    ],
)
def test_a_vendors_gpus_have_the_image_with_its_driver(
    functions: tuple[Function, ...], known: set[str], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert passthrough.image_name(functions, "default", known) == name
    assert not caplog.records


def test_a_machine_that_is_given_one_boots_that_image_and_no_other_does(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "store", tmp_path / "run")
    for name in ("default", "default-nvidia"):
        add_image(store, tmp_path, name, cmdline=name)
    settings = load()
    paths = PodPaths("default", "web", tmp_path)
    request = setting.MachineRequest.of_nobody(settings.profiles["default"], settings, paths)
    assert setting.image_name(request, store) == "default"
    assert setting.image_name(replace(request, functions=(H100,)), store) == "default-nvidia"


def test_without_that_image_it_is_said_how_to_have_it(caplog: pytest.LogCaptureFixture) -> None:
    assert passthrough.image_name([H100], "tuned", {"default", "default-nvidia"}) == "tuned"
    assert "no guest image tuned-nvidia" in caplog.text
    assert "casemate image build --variant nvidia --name tuned" in caplog.text


@pytest.mark.parametrize(
    ("name", "image", "lacking"),
    [("default", "default-amd", "nvidia"), ("default-nvidia", "default-nvidia", "amd")],
)
def test_of_two_vendors_it_is_said_whose_driver_the_image_lacks(
    name: str, image: str, lacking: str, caplog: pytest.LogCaptureFixture
) -> None:
    known = {"default", "default-nvidia", "default-amd"}
    assert passthrough.image_name([H100, MI300], name, known) == image
    assert f"{image} has no driver for GPUs that take its variant {lacking}" in caplog.text


def test_a_profile_may_name_that_image_itself(caplog: pytest.LogCaptureFixture) -> None:
    assert passthrough.image_name([H100], "default-nvidia", {"default-nvidia"}) == "default-nvidia"
    assert not caplog.records


def test_a_kernel_without_iommufd_or_nodes_of_devices_is_legacy(dev: Path) -> None:
    assert "0000:04:00.0 has no node below" in _why(replace(GPU, address="0000:04:00.0", cdev=None), dev)
    assert "0000:04:00.0 has no node below" in _why(replace(GPU, address="0000:04:00.0", cdev="vfio9"), dev)
    (dev / "iommu").unlink()
    assert "the kernel has no IOMMUFD" in _why(GPU, dev)


def _why(function: Function, dev: Path) -> str:
    found = access_of([GPU, function], NEW["qemu"], NEW["libvirt"], str(dev))
    assert found.way == LEGACY
    return found.why


@pytest.mark.parametrize(
    ("bars_gib", "hole_gib"),
    [((), 32), ((0,), 32), ((8,), 32), ((17,), 64), ((128, 128), 512), ((192,), 512)],
)
def test_the_hole_is_a_power_of_two_and_twice_the_bars(bars_gib: tuple[int, ...], hole_gib: int) -> None:
    functions = [replace(GPU, bar_bytes=gib * GIB) for gib in bars_gib]
    assert passthrough.hole_bytes(functions) == hole_gib * GIB


def test_a_bar_beside_a_large_one_has_room() -> None:
    assert passthrough.hole_bytes([GPU]) == 512 * GIB


@pytest.mark.parametrize(
    ("memory_bytes", "cpus", "threads"),
    [
        (128 << 20, 4, 1),
        (256 << 20, 4, 1),
        (GIB - 1, 4, 3),
        (GIB, 4, 4),
        (64 * GIB, 4, 4),
        (64 * GIB, 1, 1),
        (64 * GIB, 96, 16),
        (2 * GIB, 96, 8),
    ],
)
def test_ram_is_filled_by_a_thread_for_each_256_mib_that_has_a_cpu(
    monkeypatch: pytest.MonkeyPatch, memory_bytes: int, cpus: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)) if pid == 0 else set())
    assert passthrough.prealloc_threads(memory_bytes) == threads


def test_ram_is_locked_once_whatever_the_devices() -> None:
    assert GIB < passthrough.lock_bytes(GIB) < GIB + (64 << 20)


def test_a_machine_with_devices_has_more_time() -> None:
    assert passthrough.more_s_of([], 64 * GIB) == 0
    assert passthrough.more_s_of([GPU, GPU], 64 * GIB) == 64 + 20


# --- what QEMU may open and lock ---


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str | None]]:
    """Mounts and nodes as they would be made: the user of this test need not be root."""
    made: list[tuple[str, str, str | None]] = []
    monkeypatch.setattr(
        system,
        "mount",
        lambda source, target, kind, *_: made.append((source, target, kind)),
    )
    monkeypatch.setattr(
        passthrough, "make_node", lambda path, number, uid: made.append((str(path), str(uid), None))
    )
    return made


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    said: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64 << 10, 64 << 10))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: said.append(limits))
    return said


@pytest.mark.parametrize(
    ("way", "names"),
    [(LEGACY, ["12", "vfio"]), (IOMMUFD, ["devices/vfio3", "vfio", "iommu"])],
)
def test_qemu_sees_the_nodes_of_its_devices_alone(
    dev: Path, kernel: list[tuple[str, str, str | None]], limit: object, way: str, names: list[str]
) -> None:
    passthrough.prepare([GPU], Access(way), 2_000_000_007, GIB, str(dev))
    assert kernel[0] == ("casemate", f"{dev}/vfio", "tmpfs")
    nodes = [(path, uid) for path, uid, kind in kernel[1:] if path.startswith(str(dev)) and uid.isdigit()]
    assert nodes == [(f"{dev}/vfio/{name}", "2000000007") for name in names]
    if way == IOMMUFD:
        assert kernel[-1] == (f"{dev}/vfio/iommu", f"{dev}/iommu", None)


def test_as_much_may_be_locked_as_is_needed(dev: Path, kernel: object, limit: list[tuple[int, int]]) -> None:
    passthrough.prepare([GPU], Access(LEGACY), 1000, GIB, str(dev))
    assert limit == [(passthrough.lock_bytes(GIB), passthrough.lock_bytes(GIB))]


def test_ram_that_is_not_there_is_refused_before_anything_is_made(
    dev: Path, kernel: list[object], limit: list[object], tmp_path: Path
) -> None:
    free = passthrough.available_bytes()
    assert 0 < free < 1 << 50
    with pytest.raises(ResourceExhausted, match=r"1073741824 MiB, and this host has \d+ MiB available"):
        passthrough.prepare([GPU], Access(LEGACY), 1000, 1 << 50, str(dev))
    assert (kernel, limit) == ([], [])
    passthrough.prepare([GPU], Access(LEGACY), 1000, 1 << 50, str(dev), huge_pages=True)
    assert limit  # of huge pages, which are not counted as available


def test_a_group_without_a_node_is_named(dev: Path, kernel: object, limit: object) -> None:
    (dev / "vfio/12").unlink()
    with pytest.raises(FailedPrecondition, match="vfio/12: No such file"):
        passthrough.prepare([GPU], Access(LEGACY), 1000, GIB, str(dev))


# --- the guest ---


def found(**fields: object) -> api.FoundDevice:
    given: dict[str, object] = {"name": GPU.address, "address": "0000:06:00.0"}
    return api.FoundDevice(**given | fields)  # type: ignore[arg-type]


def test_the_guest_is_told_where_each_is() -> None:
    request = passthrough.request_of(
        [GPU, replace(GPU, address="x", port=1, function=1)], ["00:06.0", "00:06.1"], 2.5
    )
    assert [(each.name, each.port, each.function, each.kind) for each in request.devices] == [
        ("0000:3b:00.0", "00:06.0", 0, "gpu"),
        ("x", "00:06.1", 1, "gpu"),
    ]
    assert [each.node for each in request.devices] == [-1, -1]
    assert request.limit_ms == 2500


def test_the_guest_is_told_on_which_of_its_nodes_each_is() -> None:
    functions = [replace(GPU, node=node) for node in (3, None, 7)]
    request = passthrough.request_of(functions, ["00:06.0"], 1, Backing(cells=(Cell(1, GIB), Cell(3, GIB))))
    assert [each.node for each in request.devices] == [1, -1, -1]


def test_what_came_up_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "casemate"):
        passthrough.check([GPU], api.DevicesResponse(devices=[found(driver="nvme", nodes=["nvme0n1"])]))
        passthrough.check([GPU], api.DevicesResponse(devices=[found()]))
    assert "device 0000:3b:00.0 is 0000:06:00.0 in the guest: nvme nvme0n1" in caplog.text
    assert "without a driver, an entry of sysfs alone" in caplog.text


def test_one_that_does_not_come_up_is_named_with_the_kernels_words() -> None:
    answer = api.DevicesResponse(
        devices=[found(problem="no namespace\x1b[2J", words=["nvme 0000:06:00.0: timeout\x07"])]
    )
    other = replace(GPU, address="0000:3c:00.0")
    with pytest.raises(Unavailable) as caught:
        passthrough.check([GPU, other], answer)
    assert "device 0000:3b:00.0 (10de H100): no namespace?[2J" in caught.value.brief
    assert caught.value.details == (
        "  nvme 0000:06:00.0: timeout?\ndevice 0000:3c:00.0 (10de H100): the guest says nothing of it"
    )


def test_a_node_is_of_one_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "mknod", lambda _, mode, number: made.append((mode, number, 0)))
    monkeypatch.setattr(os, "chown", lambda _, uid, gid: made.append((uid, gid, 1)))
    passthrough.make_node(tmp_path / "12", 7, 1234)
    assert made == [(stat.S_IFCHR | 0o600, 7, 0), (1234, -1, 1)]
