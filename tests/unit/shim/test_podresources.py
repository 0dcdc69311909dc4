"""What a kubelet is asked, and what is made of its answers: right ones, slow ones, garbage."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rpc.api import podresources as api
from rpc.errors import FailedPrecondition, NotFound, ResourceExhausted, Unavailable
from shim import podresources
from shim.podresources import ask, resolved
from tests.unit.shim.kubelets import NAME, NAMESPACE, Kubelet, got, pod, says
from tests.unit.vfio.test_allocated import GPU, Host
from vfio.allocated import Reader
from vfio.cdinames import Names

PLENTY_S = 30.0
NOT_VFIOS = "is not the machine's to have: its id names no CDI device, nor a device of VFIO's"
GPUS = {"main": {"nvidia.com/pgpu": ["3"]}}


@pytest.fixture
def kubelet(tmp_path: Path) -> Iterator[Kubelet]:
    with Kubelet(tmp_path).running() as kubelet:
        yield kubelet


def asked(kubelet: Kubelet, timeout_s: float = PLENTY_S) -> api.PodResources | None:
    return ask(kubelet.socket, NAMESPACE, NAME, timeout_s)


def listed(*pods: api.PodResources) -> dict[str, str]:
    return says(api.ListPodResourcesResponse(pod_resources=list(pods)))


# --- the kubelet ---


def test_a_kubelet_that_knows_get_is_asked_once(kubelet: Kubelet) -> None:
    kubelet.answers(got(GPUS))
    assert asked(kubelet) == pod(GPUS)
    assert kubelet.asked == ["Get"]


OLDER = {
    "before 1.27": {"code": "UNIMPLEMENTED", "details": "unknown method Get"},
    "without its feature gate": {"code": "UNKNOWN", "details": "PodResources API Get method disabled"},
    "that looked elsewhere": {"code": "UNKNOWN", "details": "pod training in namespace red not found"},
}


@pytest.mark.parametrize("why", list(OLDER))
def test_an_older_kubelets_list_tells(kubelet: Kubelet, why: str) -> None:
    others = (pod({}, "blue"), pod({"main": {"nvidia.com/pgpu": ["4"]}}, NAMESPACE, "other"))
    kubelet.answers({"Get": OLDER[why], "List": listed(*others, pod(GPUS))})
    assert asked(kubelet) == pod(GPUS)
    kubelet.answers({"Get": OLDER[why], "List": listed(*others)})
    assert asked(kubelet) is None
    assert kubelet.asked == ["Get", "List"] * 2


def test_of_two_pods_of_one_name_it_is_not_said_whose_a_device_is(kubelet: Kubelet) -> None:
    kubelet.answers({"List": listed(pod(GPUS), pod({}))})
    with pytest.raises(Unavailable, match="has 2 pods red/training: one has to end first"):
        asked(kubelet)


def test_a_kubelet_that_is_asked_too_often_is_asked_again(kubelet: Kubelet) -> None:
    kubelet.answers({"Get": got(GPUS)["Get"] | {"busy": 3}})
    assert asked(kubelet) == pod(GPUS)
    assert kubelet.asked == ["Get"] * 4
    kubelet.answers({"Get": {"busy": 1000}})
    with pytest.raises(Unavailable) as caught:
        asked(kubelet)
    assert "RESOURCE_EXHAUSTED: rejected by rate limit" in str(caught.value)


SILENT: dict[str, tuple[dict[str, Any], str]] = {
    "an error": ({"Get": {"code": "INTERNAL", "details": "out\nof order"}}, r"INTERNAL: out\?of order"),
    "an error of its list": ({"List": {"code": "PERMISSION_DENIED", "details": ""}}, "PERMISSION_DENIED"),
    "nothing in time": ({"Get": {"hang": True}}, "DEADLINE_EXCEEDED"),
    "another pod": (
        {"Get": says(api.GetPodResourcesResponse(pod_resources=pod(GPUS, "blue")))},
        "it answers of another",
    ),
    "no pod": ({"Get": {"hex": ""}}, "it answers of another"),
    "garbage": ({"Get": {"hex": "ffffffffff"}}, "malformed protobuf message"),
    "a message that is cut off": (
        {"Get": {"hex": got(GPUS)["Get"]["hex"][:-2]}},
        "malformed protobuf message",
    ),
    "nesting without end": ({"Get": {"hex": "0b" * 1000}}, "malformed protobuf message: nested deeper"),
    "elements without end": ({"List": {"hex": "0a00" * (1 << 17)}}, "malformed protobuf message: more than"),
    "more than is read": ({"Get": {"hex": "00" * ((16 << 20) + 1)}}, "RESOURCE_EXHAUSTED"),
}


@pytest.mark.parametrize("what", list(SILENT))
def test_a_kubelet_that_does_not_say_is_an_error_that_says_why(kubelet: Kubelet, what: str) -> None:
    answers, why = SILENT[what]
    kubelet.answers(answers)
    with pytest.raises(Unavailable, match=why) as caught:
        asked(kubelet, 0.5 if what == "nothing in time" else PLENTY_S)
    assert caught.value.brief == "the kubelet does not say which devices the pod has"
    assert "vfio.pod_resources" in str(caught.value.hint)


def test_a_socket_that_nobody_serves_is_an_error(tmp_path: Path) -> None:
    kubelet = Kubelet(tmp_path)
    with kubelet.running():
        pass
    with pytest.raises(Unavailable, match="UNAVAILABLE"):
        asked(kubelet)


# --- its answer ---


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host", GPU)


def test_each_container_has_its_own_and_what_is_not_vfios_is_a_line(host: Host) -> None:
    gpu = host.group(GPU)
    host.name("example.org/gpu", "first", f"/dev/vfio/{gpu}")
    containers = {
        "main": {"example.org/gpu": ["first"], "example.org/fpga": [f"f{n}" for n in range(10)]},
        "side": {"intel.com/nic": [str(GPU)]},
        "bare": {},
    }
    assert resolved(pod(containers), host.reader()) == {
        "devices": [
            ["main", "example.org/gpu first", gpu, ""],
            ["side", f"intel.com/nic {GPU}", None, str(GPU)],
        ],
        "lines": [
            f"example.org/fpga of container main (f0, f1, f2, f3, f4, f5, f6, f7 and 2 more) {NOT_VFIOS}",
        ],
    }


def test_claims_of_dynamic_resource_allocation_are_names_of_cdi(host: Host) -> None:
    gpu = host.group(GPU)
    host.name("gpu.example.org/claim", "uid-0", f"/dev/vfio/{gpu}")
    names = ["gpu.example.org/claim=uid-0", "gpu.example.org/claim=uid-1"]
    resource = api.ClaimResource(cdi_devices=[api.CDIDevice(name=name) for name in names])
    claim = api.DynamicResource(claim_name="gpus", claim_namespace=NAMESPACE, claim_resources=[resource])
    said = pod({"main": {}})
    said.containers[0].dynamic_resources.append(claim)
    found = resolved(said, host.reader())
    assert found["devices"] == [["main", names[0], gpu, ""]]
    (line,) = found["lines"]
    assert "no file of CDI has the name" in line


def test_a_file_that_is_not_read_is_said_where_a_name_was_not_found(host: Host) -> None:
    (host.cdi / "broken.yaml").write_text("kind: [")
    found = resolved(pod({"main": {"example.org/gpu": ["first"]}}), host.reader())
    assert f"{host.cdi}/broken.yaml is not read: it is not YAML" in found["lines"][1]
    assert resolved(pod({"main": {}}), host.reader()) == {"devices": [], "lines": []}


@pytest.mark.parametrize("ids", [{"main": {"x.y/z": ["a"] * 1025}}, {"main": {"x.y/z": ["a" * 513]}}])
def test_there_are_bounds_to_what_is_believed(host: Host, ids: dict[str, dict[str, list[str]]]) -> None:
    with pytest.raises(ResourceExhausted, match="more than 1024 devices, or one whose name"):
        resolved(pod(ids), host.reader())


def test_what_is_wrong_with_a_device_is_said_with_its_name(host: Host) -> None:
    host.name("example.org/gpu", "gone", "/dev/vfio/77")
    host.name("example.org/gpu", "unreal", "/dev/vfio/noiommu-0")
    about = "device example.org/gpu {}, which the kubelet has for container 'main'"
    for name, kind, why in (
        ("gone", NotFound, "/dev/vfio/77: the host has no such device any more"),
        ("unreal", FailedPrecondition, "/dev/vfio/noiommu-0: no IOMMU is before it"),
    ):
        with pytest.raises(kind) as caught:
            resolved(pod({"main": {"example.org/gpu": [name]}}), host.reader())
        assert caught.value.brief == f"{about.format(name)}: {why}"


def test_words_of_a_plugins_are_fit_for_a_log(tmp_path: Path) -> None:
    words = resolved(pod({"main": {"x.y/z\x1b[31m": ["a\nb"]}}), Reader(Names([]), str(tmp_path)))["lines"]
    assert words == [f"x.y/z?[31m of container main (a?b) {NOT_VFIOS}"]


# --- the program ---


def test_the_program_writes_what_it_found_or_the_error(kubelet: Kubelet, host: Host) -> None:
    gpu = host.group(GPU)
    words = [str(PLENTY_S), str(host.tree.sys), kubelet.socket, NAMESPACE, NAME, str(host.cdi)]

    def run() -> Any:
        reading, writing = os.pipe()
        podresources.main([str(writing), *words])
        with open(reading) as file:
            return json.load(file)

    kubelet.answers(got({"main": {"nvidia.com/pgpu": [str(gpu)]}}))
    assert run() == {"devices": [["main", f"nvidia.com/pgpu {gpu}", gpu, ""]], "lines": []}
    kubelet.answers({"List": listed()})
    assert run() == {"lines": ["the kubelet has no pod red/training, and so no devices for it"]}
    kubelet.answers({"Get": {"code": "INTERNAL", "details": "no"}})
    code, brief, details, hint = run()["error"]
    assert (code, brief) == (int(Unavailable.code), "the kubelet does not say which devices the pod has")
    assert details == f"{kubelet.socket}: INTERNAL: no"
    assert hint
