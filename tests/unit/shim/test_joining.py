"""Which pod a container is in that is to be in another one's network: found by its anchor's pid."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpc.errors import FailedPrecondition
from shim.bootstrap import pod_of, refuse_without_pod
from shim.joining import pod_of_network


@pytest.fixture
def anchor(tmp_path: Path) -> Iterator[int]:
    """The pid of a process of an anchor's name."""
    program = tmp_path / "casemate-anchor"
    shutil.copy("/bin/cat", program)
    with subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.read(1)  # it is that program now
        yield process.pid
        process.stdin.close()


def write_pod(run: Path, namespace: str, pod_id: str, *pids: int) -> None:
    directory = run / "pods" / f"{namespace}-{pod_id}"
    directory.mkdir(parents=True)
    containers = [{"id": f"{pod_id}-{pid}", "pid": pid} for pid in pids]
    state = {"namespace": namespace, "id": pod_id, "containers": containers}
    (directory / "state.json").write_text(json.dumps(state))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CASEMATE_RUN_DIR", str(tmp_path))
    (tmp_path / "pods" / "begins").mkdir(parents=True)
    return tmp_path


def test_an_anchors_network_is_its_pods(run: Path, anchor: int) -> None:
    write_pod(run, "default", "other", anchor + 1)
    write_pod(run, "default", "web", 1, anchor)
    path = f"/proc/{anchor}/ns/net"
    assert pod_of_network("default", path) == "web"
    spec = {"linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": path}]}}
    assert pod_of(spec, "asks", "default") == "web"
    with pytest.raises(FailedPrecondition, match="container asks: pod web has no virtual machine any more"):
        refuse_without_pod(spec, "asks", "web")
    grouped = spec | {"annotations": {"io.containerd.runc.v2.group": "group"}}
    assert pod_of(grouped, "asks", "default") == "group"
    refuse_without_pod(grouped, "asks", "group")


def test_an_anchor_of_another_namespaces_or_of_no_pod_is_refused(run: Path, anchor: int) -> None:
    write_pod(run, "others", "web", anchor)
    with pytest.raises(FailedPrecondition, match=f"/proc/{anchor}/ns/net: it is of no pod that runs in"):
        pod_of_network("default", f"/proc/{anchor}/ns/net")


@pytest.mark.parametrize("path", ["/proc/1/ns/net", "/proc/self/ns/net", "/run/netns/a", "/proc/1/ns/net/.."])
def test_another_network_is_no_pods(run: Path, path: str) -> None:
    write_pod(run, "default", "web", 1)
    assert pod_of_network("default", path) is None
