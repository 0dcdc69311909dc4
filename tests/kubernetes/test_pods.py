"""What a user does with a pod that runs: kubectl's verbs."""

import filecmp
import re
import subprocess
from pathlib import Path

import pytest

from tests.kubernetes.cluster import Cluster
from tests.kubernetes.kubectl import BOOT_ID, FOREVER, IMAGE, Kubectl, container
from tests.vm.pods import TERMINAL_PROGRAM

FETCH = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=30).read().decode())"
SERVE = "cd /srv && echo from the pod >greeting && exec python3 -m http.server --bind 127.0.0.1 8000"
CONNECT = "import socket; socket.create_connection(('127.0.0.1', 8000), 1)"


def ready_when(*command: str) -> dict[str, object]:
    """A readinessProbe, often."""
    return {"exec": {"command": list(command)}, "periodSeconds": 1, "timeoutSeconds": 10}


@pytest.mark.client("kubectl create, get, delete", "works", "several containers in one VM")
def test_a_pod_is_ready_and_is_one_machine(kubectl: Kubectl) -> None:
    with kubectl.pod(container(*FOREVER), container(*FOREVER, name="beside")) as pod:
        boots = {pod.exec(*BOOT_ID, container=name).ok().out for name in ("main", "beside")}
        assert len(boots) == 1
        assert boots != {Path("/proc/sys/kernel/random/boot_id").read_text()}
        status = pod.status
        assert status["phase"] == "Running"
        assert f" {status['podIP']}/" in pod.sh("ip -4 -o address")


@pytest.mark.client("kubectl logs, logs --follow, logs --timestamps, logs --tail", "works", "")
def test_logs(kubectl: Kubectl) -> None:
    script = (
        "for n in 1 2 3; do echo line $n; done; echo fault >&2; read word; echo heard $word; exec sleep 1000"
    )
    with kubectl.pod(container("sh", "-c", script, stdin=True)) as pod:
        pod.wait_said("fault\n")
        assert sorted(pod.log().splitlines()) == ["fault", "line 1", "line 2", "line 3"]
        assert pod.log("--tail=1").count("\n") == 1
        assert re.fullmatch(r"(\d{4}-\d\d-\d\dT\S+ .+\n){4}", pod.log("--timestamps"))
        with kubectl.start("logs", "--follow", pod.name) as log:
            log.read_until(b"line 3\n", 30)
            with kubectl.start("attach", "--stdin", pod.name) as attached:
                attached.write(b"something\n")
                log.read_until(b"heard something\n", 30)


@pytest.mark.client("kubectl exec, exec --stdin", "works", "its exit status and streams are the program's")
def test_exec(kubectl: Kubectl) -> None:
    with kubectl.pod() as pod:
        result = pod.exec("sh", "-c", "echo out; echo err >&2; exit 3")
        assert (result.code, result.stdout) == (3, b"out\n")
        assert result.err.startswith("err\n")
        data = bytes(range(256)) * 8192
        argv = ("exec", "--stdin", pod.name, "--", "cat")
        assert kubectl(*argv, stdin=data).ok().stdout == data


@pytest.mark.client("kubectl exec --stdin --tty", "works", "")
def test_exec_with_a_terminal(kubectl: Kubectl) -> None:
    with (
        kubectl.pod() as pod,
        kubectl.terminal(
            *("exec", "--stdin", "--tty", pod.name, "--", "python3", "-c", TERMINAL_PROGRAM),
            columns=90, rows=30,
        ) as terminal,
    ):  # fmt: skip
        terminal.expect(rb"isatty True True True", 30)
        terminal.expect(rb"size=90x30", 10)
        terminal.resize(60, 20)
        terminal.expect(rb"size=60x20", 10)
        terminal.write(b"quit\r")
        assert terminal.finish(20)[0] == 7


@pytest.mark.client("kubectl attach --stdin --tty", "works", "")
def test_attach(kubectl: Kubectl) -> None:
    echo = container("sh", "-c", "while read word; do echo heard $word; done", stdin=True, tty=True)
    with kubectl.pod(echo) as pod, kubectl.terminal("attach", "-it", pod.name) as terminal:
        terminal.write(b"one\r")
        terminal.expect(rb"heard one", 30)
        terminal.write(b"two\r")
        terminal.expect(rb"heard two", 30)


@pytest.mark.client("kubectl port-forward", "works", "")
def test_port_forward(kubectl: Kubectl, cluster: Cluster) -> None:
    server = container("sh", "-c", SERVE, readinessProbe=ready_when("python3", "-c", CONNECT))
    volume = {"name": "srv", "emptyDir": {}}
    server["volumeMounts"] = [{"name": "srv", "mountPath": "/srv"}]
    with (
        kubectl.pod(server, volumes=[volume]) as pod,
        kubectl.start("port-forward", f"pod/{pod.name}", ":8000") as forwarding,
    ):
        said = forwarding.read_until(b"-> 8000", 60).decode()
        port = re.findall(r"127\.0\.0\.1:(\d+) ->", said)[0]
        asked = subprocess.run(
            cluster.instance.inside("python3", "-c", FETCH, f"http://127.0.0.1:{port}/greeting"),
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        assert asked.stdout == "from the pod\n\n"


@pytest.mark.client("kubectl cp", "works", "where the image has tar, as always")
def test_files_are_copied_in_and_out(kubectl: Kubectl, cluster: Cluster, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    (source / "below").mkdir(parents=True)
    (source / "below" / "data").write_bytes(bytes(range(256)) * 4096)
    (source / "name with spaces").write_text("text\n")
    with kubectl.pod() as pod:
        kubectl("cp", str(source), f"{pod.name}:/srv/there").ok()
        assert pod.sh("stat -c %s /srv/there/below/data") == f"{256 * 4096}\n"
        kubectl("cp", f"{pod.name}:/srv/there", str(back)).ok()
    match, mismatch, errors = filecmp.cmpfiles(
        source, back, ["below/data", "name with spaces"], shallow=False
    )
    assert (len(match), mismatch, errors) == (2, [], [])


@pytest.mark.client("kubectl debug --target (ephemeral containers)", "works", "with the target's process IDs")
def test_an_ephemeral_container_sees_its_targets_processes(kubectl: Kubectl) -> None:
    with kubectl.pod(container("sleep", "1234")) as pod:
        kubectl(
            *("debug", pod.name, f"--image={IMAGE}", "--image-pull-policy=Never", "--target=main"),
            *("--container=debugger", "--profile=general", "--", *FOREVER),
        ).ok()
        statuses = "ephemeralContainerStatuses"
        kubectl.wait(
            lambda: statuses in pod.status and "running" in pod.of("debugger", statuses)["state"],
            "the debugging container runs",
        )
        seen = pod.exec("ps", "-eo", "args=", container="debugger").ok().out.splitlines()
        assert {"sleep 1234", "sleep 1000"} <= set(seen)
        boots = {pod.exec(*BOOT_ID, container=name).ok().out for name in ("main", "debugger")}
        assert len(boots) == 1
