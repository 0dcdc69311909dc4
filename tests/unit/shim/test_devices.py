"""When a pod's devices are taken and given back: a real ledger, a bus of files, a guest in memory."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from config.annotations import DEVICES
from rpc.errors import FailedPrecondition, PermissionDenied, ResourceExhausted, Unavailable
from shim import reclaim
from shim.cleanup import clean_pod
from shim.devicewishes import DeviceWishes
from shim.giving import Giver
from shim.hugepages import Ram
from shim.journal import Kind, read_journal
from shim.record import Identity
from tests.unit.rpc.wires import until
from tests.unit.shim import pods
from tests.unit.shim.devicehosts import FIRST, SECOND, DeviceHost, node, wishes
from tests.unit.shim.devicepods import TWO, given_pod, in_a_loop
from tests.unit.shim.libvirts import Domain
from tests.unit.shim.pods import POD, Recorder, Sleepers, config

ROOT = Path(__file__).parents[3]


@pytest.fixture
def ledger_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """In memory: a disk's time is not what these tests are about."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as directory:
        monkeypatch.setenv("CASEMATE_LEDGER_DIR", directory)
        yield Path(directory)


@pytest.fixture
def host(tmp_path: Path, ledger_dir: Path, monkeypatch: pytest.MonkeyPatch) -> DeviceHost:
    """What the shim takes for this machine."""
    host = DeviceHost(tmp_path / "host")
    monkeypatch.setattr(Giver, "of", lambda _, __, settings: host.giver(settings, POD))
    return host


@in_a_loop
async def test_they_are_in_use_before_there_is_a_machine_and_free_when_delete_is_answered(
    host: DeviceHost, tmp_path: Path
) -> None:
    async with given_pod(tmp_path) as pod:
        await pod.create(annotations={DEVICES: TWO})
        (request,) = pod.requests
        assert [each.address for each in request.functions] == [str(FIRST), str(SECOND)]
        assert pod.states == {str(FIRST): "in use", str(SECOND): "in use"}
        await pod.test.pod.start(POD)
        await pod.test.exit()
        assert pod.states[str(FIRST)] == "in use"
        await pod.test.pod.delete(POD)
        assert pod.test.guest.qemu.exited.is_set()
        assert set(pod.states.values()) == {"free"}
        assert host.drivers()[FIRST] == "nvidia"
        names = [span.name for span in pod.test.pod.trace.spans]
        assert names.index("devices.claim") < names.index("devices.release")


@in_a_loop
async def test_the_container_is_given_what_it_asks_for(host: DeviceHost, tmp_path: Path) -> None:
    async with given_pod(tmp_path, "01:00.0,path=/dev/one; 03:00.0") as pod:
        await pod.create(annotations={DEVICES: " 01:00.0,path=/dev/one; 03:00.0"})
        (asked,) = pod.test.agent.created
        assert [(each.name, each.path, each.mode) for each in asked.devices] == [
            ("0000:01:00.0", "/dev/one", 0o660),
            ("0000:03:00.0", "", 0o660),
            ("0000:03:00.1", "", 0o660),
        ]
        await pod.create("bare")
        assert pod.test.agent.created[1].devices == []


@in_a_loop
async def test_a_container_gets_no_device_that_its_pod_did_not_get_at_boot(
    host: DeviceHost, tmp_path: Path
) -> None:
    async with given_pod(tmp_path, "01:00.0") as pod:
        await pod.test.pod.machine()
        with pytest.raises(FailedPrecondition, match=r"02:00\.0: its pod was not given this when it started"):
            await pod.create(annotations={DEVICES: "02:00.0"})
        devices = pod.test.pod.means.devices
        group = int((host.node[FIRST].directory / "iommu_group").readlink().name)
        (one,) = devices.of_container("c", wishes(node(group, "", "/dev/gpu", 0o600, 7, 8)))
        assert (one.name, one.path, one.mode, one.uid, one.gid) == (str(FIRST), "/dev/gpu", 0o600, 7, 8)
        (same,) = devices.of_container("c", wishes(node(None, str(FIRST))))
        assert same.name == str(FIRST)
        for each in (node(group + 1, ""), node(None, str(SECOND))):
            with pytest.raises(FailedPrecondition, match="its pod was not given this"):
                devices.of_container("c", wishes(each))


@in_a_loop
async def test_of_a_pod_without_devices_no_container_gets_one(tmp_path: Path, ledger_dir: Path) -> None:
    async with pods.running_pod(tmp_path) as pod:
        with pytest.raises(FailedPrecondition, match="devices are in a pod's machine from its start on"):
            await pod.create(document=config(annotations={DEVICES: "01:00.0"}))
    assert os.listdir(ledger_dir) == []


@in_a_loop
async def test_a_machine_that_cannot_be_made_leaves_them_free(host: DeviceHost, tmp_path: Path) -> None:
    async with given_pod(tmp_path, fails=Unavailable("QEMU did not start")) as pod:
        with pytest.raises(Unavailable, match="QEMU did not start"):
            await pod.test.pod.machine()
        assert set(pod.states.values()) == {"free"}
        assert host.drivers()[FIRST] == "nvidia"


@in_a_loop
async def test_who_may_not_ask_is_refused_before_anything(host: DeviceHost, tmp_path: Path) -> None:
    with pods.host(tmp_path):
        pod = pods.empty_pod(tmp_path, Recorder(), Sleepers())
        pod.begin(config(annotations={DEVICES: TWO}), 0.0)
        with pytest.raises(PermissionDenied, match=f"annotation {DEVICES} is not allowed on this host"):
            await pod.machine()
        await pods.close(pod)


@in_a_loop
async def test_a_second_pod_is_told_who_has_them(
    host: DeviceHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with given_pod(tmp_path) as first:
        await first.test.pod.machine()
        monkeypatch.setattr(Giver, "of", lambda _, __, settings: host.giver(settings, "other"))
        async with given_pod(tmp_path.with_name("o")) as second:
            with pytest.raises(ResourceExhausted) as caught:
                await second.test.pod.machine()
            assert f"gpu {FIRST} is in use, pod default/{POD}" in str(caught.value.details)
            assert second.requests == []
        assert set(first.states.values()) == {"in use"}


@in_a_loop
async def test_of_a_qemu_that_was_killed_they_are_reset_with_the_pods_deletion(
    host: DeviceHost, tmp_path: Path
) -> None:
    async with given_pod(tmp_path) as pod:
        await pod.create(annotations={DEVICES: TWO})
        await pod.test.pod.start(POD)
        pod.test.guest.qemu.kill()
        await pod.test.pod.container(POD).init.exited.wait()
        assert pod.states[str(FIRST)] == "in use"
        await pod.test.pod.delete(POD)
        assert set(pod.states.values()) == {"free"}
        assert {address for address, _ in host.kernel.resets} == {str(FIRST), str(SECOND)}


@in_a_loop
async def test_a_pod_that_ends_while_they_are_taken_leaves_them_free(
    host: DeviceHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, taking = asyncio.get_running_loop(), asyncio.Event()
    take = Giver.take

    def slow(giver: Giver, wishes: DeviceWishes, ram: Ram, own_cpus: int) -> Any:
        taken = take(giver, wishes, ram, own_cpus)
        asyncio.run_coroutine_threadsafe(_set(taking), loop).result()
        return taken

    monkeypatch.setattr(Giver, "take", slow)
    async with given_pod(tmp_path) as pod:
        await taking.wait()
        await pod.test.pod.stop()
        assert set(pod.states.values()) == {"free"}


async def _set(event: asyncio.Event) -> None:
    event.set()


@in_a_loop
async def test_one_that_fell_off_the_bus_is_quarantined_and_the_pod_ends(
    host: DeviceHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with given_pod(tmp_path) as pod:
        await pod.create(annotations={DEVICES: TWO})
        await pod.test.pod.start(POD)
        host.tree.remove(host.node[FIRST])
        await pod.test.exit()
        await pod.test.pod.delete(POD)
        assert pod.states == {str(FIRST): "quarantined", str(SECOND): "free"}
        assert f"device {FIRST} is quarantined" in caplog.text


@pytest.mark.parametrize(("is_there", "after"), [("gone", "quarantined"), ("there", "free")])
@in_a_loop
async def test_one_that_a_running_machine_loses_is_named_once_while_the_containers_go_on(
    host: DeviceHost, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_there: str, after: str
) -> None:
    """Pulled out of the host, or let go of by the guest."""
    async with given_pod(tmp_path) as pod:
        await pod.create(annotations={DEVICES: TWO})
        container = await pod.test.pod.start(POD)
        assert [each["gone"] for each in pod.test.state()["devices"]] == [False, False]
        if is_there == "gone":
            host.tree.remove(host.node[SECOND])
        await asyncio.to_thread(pod.domain.remove, str(SECOND))  # in a thread of libvirt's
        await asyncio.to_thread(pod.domain.tell, "hostdev1")
        await until(lambda: pod.test.state()["devices"][1]["gone"])
        (line,) = [each for each in caplog.messages if "is gone from the pod's machine" in each]
        assert line.startswith(f"device {SECOND} (10de:2330")
        assert container.init.state.name == "running"
        assert not pod.test.guest.machine.lost.done()
        assert pod.test.state()["devices"][0]["gone"] is False
        await pod.test.exit()
        await pod.test.pod.delete(POD)
        assert pod.states == {str(FIRST): "free", str(SECOND): after}


@in_a_loop
async def test_a_machine_that_qemu_stops_for_a_device_is_lost_in_qemus_words(
    host: DeviceHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would stand still for ever, and its containers with it."""
    words = f"vfio {FIRST}: Unrecoverable error detected"
    async with given_pod(tmp_path) as pod:
        await pod.create(annotations={DEVICES: TWO})
        container = await pod.test.pod.start(POD)
        monkeypatch.setattr(pod.test.guest.machine, "_qemu_words", lambda: words)
        await asyncio.to_thread(pod.domain.halt)
        await container.init.exited.wait()
        assert container.init.end.exit_status == 137
        assert pod.test.state()["error"] == f"QEMU has stopped the pod's machine: {words}"
        await pod.test.pod.delete(POD)
        assert set(pod.states.values()) == {"free"}


@in_a_loop
async def test_what_libvirt_says_of_devices_as_a_pod_ends_is_no_loss(
    host: DeviceHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with given_pod(tmp_path) as pod:
        await pod.test.pod.machine()
        await pod.test.guest.machine.halt()
        pod.domain.remove(str(FIRST))
        await pod.test.agent.calls_settle()
        assert "is gone" not in caplog.text


@in_a_loop
async def test_a_libvirt_that_does_not_tell_of_losses_costs_a_warning(
    host: DeviceHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Domain, "fails", "unsupported event", raising=False)
    async with given_pod(tmp_path) as pod:
        await pod.create(annotations={DEVICES: TWO})
        assert "lost while the pod runs will not be told of" in caplog.text
        assert "unsupported event" in caplog.text


@in_a_loop
async def test_what_a_killed_shim_had_is_taken_back_from_its_journal(
    host: DeviceHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Giver, "of", lambda _, __, settings: host.giver(settings, POD, started=1))
    async with given_pod(tmp_path) as pod:
        await pod.test.pod.machine()
        paths = pod.test.pod.paths
        assert [entry.kind for entry in read_journal(paths.journal)] == [Kind.DEVICES]
        monkeypatch.setattr(reclaim, "Bus", lambda _: host.pci())
        lines = clean_pod(paths)
        assert f"claim of device {FIRST}" in lines
        assert set(pod.states.values()) == {"free"}
        paths.directory.mkdir(parents=True)  # the pod of this test ends as if it lived


def test_the_shim_of_a_pod_without_devices_imports_nothing_for_them() -> None:
    code = "import shim.main, shim.daemon, node.zygote, sys; print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(said.stdout.split())
    assert "shim.devices" in modules
    assert not {name for name in modules if name.partition(".")[0] == "vfio"} | modules & {
        "sqlite3",
        "config.cpulist",
        "shim.dedicated",
        "shim.giving",
        "shim.kubelet",
        "shim.reclaim",
        "shim.vm.pinning",
        "grpc",
        "yaml",
    }


def test_the_identity_of_the_owner_is_the_hosts(ledger_dir: Path, tmp_path: Path) -> None:
    with pods.host(tmp_path):
        from config.load import load

        giver = Giver.of(Identity("k8s.io", "p", 4711, 99, 7), "", load())
    assert (giver._me.pid, giver._me.started, giver._proc) == (4711, 99, "/proc/self/fd/7")
    assert (str(giver._pod), giver._pod.tenant) == ("k8s.io/p", "k8s.io")
