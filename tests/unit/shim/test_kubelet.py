"""Pods that a kubelet has allocated devices to: a real gRPC server, a host in files, a guest in memory."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import pytest

from config.annotations import DEVICES
from rpc.api import cri
from rpc.errors import FailedPrecondition, Internal, InvalidArgument, NotFound, Unavailable
from shim import kubelet as module
from shim.giving import Giver
from shim.podconfig import document_of
from shim.wants import wants_of
from tests.unit.shim.devicehosts import (
    AUDIO,
    CARD,
    DISK,
    FIRST,
    SECOND,
    DeviceHost,
    settings_in_memory,
    wishes,
)
from tests.unit.shim.devicehosts import node as vfio_node
from tests.unit.shim.devicepods import GivenPod, given_pod, in_a_loop
from tests.unit.shim.kubelets import NAME, NAMESPACE, Kubelet, got
from tests.unit.shim.pods import POD, config
from vfio.address import PciAddress

CRI = "io.kubernetes.cri."
SANDBOX = {
    f"{CRI}container-type": "sandbox",
    f"{CRI}sandbox-id": POD,
    f"{CRI}sandbox-name": NAME,
    f"{CRI}sandbox-namespace": NAMESPACE,
}


def container(name: str, **more: str) -> dict[str, str]:
    """Its annotations."""
    kind = {f"{CRI}container-type": "container", f"{CRI}container-name": name}
    return {**SANDBOX, **kind, **more}


class Node:
    """A node of Kubernetes: devices, bound to vfio-pci; a kubelet; CDI."""

    def __init__(self, host: DeviceHost, kubelet: Kubelet, cdi: Path) -> None:
        self.host = host
        self.kubelet = kubelet
        self.cdi = cdi

    def bind(self, *addresses: PciAddress) -> None:
        for address in addresses:
            self.host.kernel._unbind(address, "")
            self.host.kernel._take(address, "vfio-pci")

    def group(self, address: PciAddress) -> int:
        return int((self.host.node[address].directory / "iommu_group").readlink().name)

    def pod(
        self, directory: Path, settings: str = "", **annotations: str
    ) -> AbstractAsyncContextManager[GivenPod]:
        vfio = f'[vfio]\npod_resources = "{self.kubelet.socket}"\ncdi_dir = "{self.cdi}"\n'
        document = config(annotations={**SANDBOX, **annotations})
        return given_pod(directory, settings=vfio + settings, document=document)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """What the shim takes for this machine."""
    host, cdi, dev = DeviceHost(tmp_path / "host"), tmp_path / "cdi", tmp_path / "dev"
    for directory in (cdi, dev):
        directory.mkdir()
    (dev / "29").touch()
    monkeypatch.setattr(Giver, "of", lambda _, __, settings: host.giver(settings, POD))
    monkeypatch.setattr(module, "SYSFS", str(host.tree.sys))
    monkeypatch.setattr(module, "VFIO", str(dev))
    monkeypatch.setattr(module, "RUN_DIRECTORY", str(tmp_path / "run-cdi"))
    with settings_in_memory(), Kubelet(tmp_path).running() as kubelet:
        node = Node(host, kubelet, cdi)
        node.bind(FIRST, SECOND, CARD, AUDIO)
        yield node


def given(pod: GivenPod, number: int = -1) -> list[tuple[str, str]]:
    """To a container, the last one: address and path of each."""
    return [(each.name, each.path) for each in pod.test.agent.created[number].devices]


async def sandbox(pod: GivenPod) -> None:
    await pod.create(annotations=SANDBOX)
    await pod.test.pod.start(POD)


# --- what it has ---


@in_a_loop
async def test_the_pod_has_all_and_each_container_its_own(node: Node, tmp_path: Path) -> None:
    node.kubelet.answers(
        got(
            {
                "main": {"nvidia.com/pgpu": [str(node.group(FIRST))]},
                "side": {"intel.com/x": [str(SECOND)]},
                "bare": {},
            }
        )
    )
    async with node.pod(tmp_path) as pod:
        await sandbox(pod)
        (request,) = pod.requests
        assert [each.address for each in request.functions] == [str(FIRST), str(SECOND)]
        for name, devices in {"main": [FIRST], "side": [SECOND], "bare": [], "other": []}.items():
            await pod.create(name, annotations=container(name))
            assert given(pod) == [(str(address), "") for address in devices]
        assert pod.states == {str(FIRST): "in use", str(SECOND): "in use"}
        assert [span.name for span in pod.test.pod.trace.spans].count("devices.ask") == 1
    assert node.kubelet.asked == ["Get"]
    assert node.host.drivers()[FIRST] == "vfio-pci"  # as the operator had bound it


@in_a_loop
async def test_a_name_of_cdi_may_be_all_functions_of_a_card(node: Node, tmp_path: Path) -> None:
    nodes = [{"path": f"/dev/vfio/devices/vfio{number}"} for number in (3, 4)]
    device = {"name": "card", "containerEdits": {"deviceNodes": nodes}}
    (node.cdi / "a.json").write_text(json.dumps({"kind": "example.org/gpu", "devices": [device]}))
    node.kubelet.answers(got({"main": {"example.org/gpu": ["card"]}}))
    async with node.pod(tmp_path) as pod:
        await sandbox(pod)
        await pod.create("main", annotations=container("main"))
        assert given(pod) == [(str(CARD), ""), (str(AUDIO), "")]


@in_a_loop
async def test_nodes_of_config_json_are_the_same_devices_and_say_where_they_are_to_be(
    node: Node, tmp_path: Path
) -> None:
    group = node.group(FIRST)
    node.kubelet.answers(got({"main": {"nvidia.com/pgpu": [str(group)]}, "side": {"x.y/z": [str(SECOND)]}}))
    async with node.pod(tmp_path) as pod:
        await sandbox(pod)
        devices = pod.test.pod.means.devices
        (one,) = devices.of_container("c", wishes(vfio_node(group, "", "/dev/gpu", 0o600, 7, 8)), "main")
        assert (one.name, one.path, one.mode, one.uid, one.gid) == (str(FIRST), "/dev/gpu", 0o600, 7, 8)
        both = devices.of_container("c", wishes(vfio_node(None, str(SECOND))), "main")
        assert [each.name for each in both] == [str(FIRST), str(SECOND)]
        with pytest.raises(FailedPrecondition, match="its pod was not given this when it started"):
            devices.of_container("c", wishes(vfio_node(node.group(DISK), "")), "main")


@in_a_loop
async def test_the_annotation_gives_others_beside_the_kubelets(node: Node, tmp_path: Path) -> None:
    wish = {DEVICES: "count=1,device=2330"}
    node.kubelet.answers(got({"main": {"nvidia.com/pgpu": [str(node.group(FIRST))]}}))
    async with node.pod(tmp_path, **wish) as pod:
        await sandbox(pod)
        await pod.create("main", annotations=container("main", **wish))
        assert given(pod) == [(str(SECOND), ""), (str(FIRST), "")]
        await pod.create("side", annotations=container("side", **wish))
        assert given(pod) == [(str(SECOND), "")]


@in_a_loop
async def test_what_the_annotation_names_too_is_refused(node: Node, tmp_path: Path) -> None:
    node.kubelet.answers(got({"main": {"nvidia.com/pgpu": [str(node.group(FIRST))]}}))
    async with node.pod(tmp_path, **{DEVICES: str(FIRST)}) as pod:
        with pytest.raises(InvalidArgument, match=rf"device {FIRST} is asked for by the annotation"):
            await sandbox(pod)
        assert pod.states == {}


@in_a_loop
async def test_what_is_not_vfios_makes_no_difference_but_a_line(
    node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "casemate")
    node.kubelet.answers(got({"main": {"smarter-devices/fuse": ["3"]}}))
    async with node.pod(tmp_path) as pod:
        await sandbox(pod)
        assert pod.requests[0].functions == ()
    assert "smarter-devices/fuse of container main (3) is not the machine's to have" in caplog.text


# --- what goes wrong ---


@in_a_loop
async def test_a_kubelet_that_does_not_say_is_the_pods_end(node: Node, tmp_path: Path) -> None:
    node.kubelet.answers({"Get": {"code": "INTERNAL", "details": "out of order"}})
    async with node.pod(tmp_path) as pod:
        with pytest.raises(
            Unavailable, match=r"does not say which devices the pod has.*INTERNAL: out of order"
        ):
            await sandbox(pod)
        assert pod.requests == []


@in_a_loop
async def test_what_is_wrong_with_a_device_is_the_pods_end(node: Node, tmp_path: Path) -> None:
    node.kubelet.answers(got({"main": {"nvidia.com/pgpu": ["vfio77"]}}))
    async with node.pod(tmp_path) as pod:
        with pytest.raises(
            NotFound, match=r"device nvidia\.com/pgpu vfio77, which the kubelet has for container 'main'"
        ):
            await sandbox(pod)
        assert pod.requests == []


@in_a_loop
async def test_a_pod_that_ends_while_it_asks_leaves_nobody_asking(node: Node, tmp_path: Path) -> None:
    node.kubelet.answers({"Get": {"hang": True}})
    async with node.pod(tmp_path) as pod:
        await asyncio.to_thread(node.kubelet.wait_asked)
        assert len(_asking(node)) == 1
        await pod.test.pod.stop()
        assert pod.requests == []
        assert _asking(node) == []


def _asking(node: Node) -> list[str]:
    """The programs that ask this kubelet."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):  # any process of this machine may end meanwhile
            line = path.read_bytes()
            if node.kubelet.socket.encode() in line and b"podresources.main" in line:
                found.append(str(line))
    return found


@in_a_loop
async def test_a_program_that_does_not_end_or_fails_is_an_error(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.kubelet.answers({"Get": {"hang": True}})
    with settings_in_memory() as settings:
        vfio = settings.vfio.replace(pod_resources=node.kubelet.socket)
        hurried = settings.replace(vfio=vfio, timeouts=settings.timeouts.replace(boot_s=0.2))
        wants = wants_of(config(annotations=SANDBOX), hurried, "k8s.io", POD)
        monkeypatch.setattr(module, "_PROGRAM", "import time; time.sleep(1000)")
        with pytest.raises(Unavailable, match="the program that asks did not end within 0 s"):
            await module.ask(hurried, wants, 0.1)
        for program, words in (
            ("raise SystemExit(3)", "ended .exit status 3"),
            ("import os; os.write(3, b'[')", "answers"),
        ):
            monkeypatch.setattr(module, "_PROGRAM", program)
            with pytest.raises(Internal, match=words):
                await module.ask(settings.replace(vfio=vfio), wants)


# --- who is asked ---


def test_nobody_is_asked_where_it_cannot_matter(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with settings_in_memory() as settings:

        def may_have(path: str = node.kubelet.socket, **annotations: str) -> bool:
            told = settings.replace(vfio=settings.vfio.replace(pod_resources=path))
            wants = wants_of(config(annotations=annotations or SANDBOX), told, "k8s.io", POD)
            return module.may_have(told, wants)

        assert may_have()
        assert not may_have("")
        assert not may_have(str(tmp_path / "none.sock"))
        assert not may_have(f"{node.kubelet.socket}/below")
        assert not may_have(str(tmp_path / "answers.json"))
        assert not may_have(**{f"{CRI}sandbox-name": NAME})
        assert not may_have(**container("main"))
        assert not may_have(**{**SANDBOX, f"{CRI}sandbox-name": ""})
        dev = tmp_path / "dev"
        (dev / "29").unlink()
        (dev / "vfio").touch()
        (dev / "devices").mkdir()
        assert not may_have()
        (dev / "devices/vfio0").touch()
        assert may_have()
        monkeypatch.setattr(module, "VFIO", str(tmp_path / "none"))
        assert not may_have()


def test_a_pod_of_the_sandbox_api_is_known_by_the_same_names() -> None:
    metadata = cri.PodSandboxMetadata(name=NAME, namespace=NAMESPACE, uid="u")
    document = document_of(cri.PodSandboxConfig(metadata=metadata), POD, "/run/netns/x", {}, {})
    with settings_in_memory() as settings:
        assert wants_of(document, settings, "k8s.io", POD).kubelet_pod == (NAMESPACE, NAME)
        assert wants_of(config(), settings, "k8s.io", POD).kubelet_pod is None


def test_a_stale_socket_is_one_to_be_asked(node: Node, tmp_path: Path) -> None:
    """Of a kubelet that was killed: whether it had allocated something is not known."""
    path = str(tmp_path / "stale.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    with settings_in_memory() as settings:
        told = settings.replace(vfio=settings.vfio.replace(pod_resources=path))
        assert module.may_have(told, wants_of(config(annotations=SANDBOX), told, "k8s.io", POD))
