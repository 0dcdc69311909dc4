"""How pods begin, end and begin again: what the kubelet does of itself."""

import json
import os
import signal
import time
from typing import Any

import pytest

from tests.kubernetes.cluster import Cluster
from tests.kubernetes.kubectl import BOOT_ID, Kubectl, KubePod, container

SHARED: dict[str, Any] = {"volumes": [{"name": "shared", "emptyDir": {}}]}
MOUNTED: dict[str, Any] = {"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}
OFTEN = {"periodSeconds": 1, "timeoutSeconds": 10}


@pytest.mark.client(
    "kubectl create (initContainers, restartPolicy: Never)", "works", "before the others, in the same VM"
)
def test_init_containers_come_first_and_a_pod_succeeds(kubectl: Kubectl) -> None:
    steps = [
        container("sh", "-c", "cat /proc/sys/kernel/random/boot_id >/shared/boot", name="first", **MOUNTED),
        container("sh", "-c", "test -s /shared/boot && echo second >>/shared/boot", name="second", **MOUNTED),
    ]
    main = container("sh", "-c", "cat /shared/boot /proc/sys/kernel/random/boot_id", **MOUNTED)
    with kubectl.asked(main, initContainers=steps, restartPolicy="Never", **SHARED) as pod:
        pod.wait_phase("Succeeded")
        before, said, after = pod.log().splitlines()
        assert (said, before) == ("second", after)


@pytest.mark.client("kubectl create (sidecars (initContainers with restartPolicy: Always))", "works", "")
def test_a_sidecar_runs_beside_the_others_and_ends_after_them(kubectl: Kubectl) -> None:
    script = "trap 'echo ended; exit 0' TERM; touch /shared/up; while :; do sleep 0.1; done"
    probe = {"exec": {"command": ["test", "-e", "/shared/up"]}, **OFTEN}
    sidecar = container(
        "sh", "-c", script, name="side", restartPolicy="Always", startupProbe=probe, **MOUNTED
    )
    main = container("sh", "-c", "test -e /shared/up && echo beside", **MOUNTED)
    grace: dict[str, Any] = {"terminationGracePeriodSeconds": 30}
    with kubectl.asked(main, initContainers=[sidecar], restartPolicy="Never", **SHARED, **grace) as pod:
        pod.wait_phase("Succeeded")
        assert pod.log() == "beside\n"
        assert pod.log(container="side") == "ended\n"
        assert pod.of("side", "initContainerStatuses")["state"]["terminated"]["exitCode"] == 0


@pytest.mark.client("kubectl create (restartPolicy: Always, logs --previous)", "works", "in the same VM")
def test_a_container_that_crashes_is_made_again_in_its_machine(kubectl: Kubectl) -> None:
    script = (
        "cat /proc/sys/kernel/random/boot_id;"
        " test -e /shared/was && exec sleep 1000; touch /shared/was; exit 3"
    )
    with kubectl.asked(container("sh", "-c", script, **MOUNTED), **SHARED) as pod:
        kubectl.wait(lambda: is_running_since(pod, 1), "it runs for the second time")
        last = pod.of()["lastState"]["terminated"]
        assert (last["exitCode"], last["reason"]) == (3, "Error")
        boot = pod.log("--previous")
        assert boot
        pod.wait_said(boot)  # the new one is in the same machine


def is_running_since(pod: KubePod, restarts: int, name: str = "main") -> bool:
    statuses = [one for one in pod.status.get("containerStatuses", []) if one["name"] == name]
    return any(one["restartCount"] == restarts and "running" in one["state"] for one in statuses)


@pytest.mark.client(
    "kubectl create (readinessProbe, livenessProbe, startupProbe (exec, httpGet, tcpSocket))", "works", ""
)
def test_probes(kubectl: Kubectl) -> None:
    server = """\
import http.server, os
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500 if os.path.exists("/tmp/ill") else 200)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer(("", 8000), Answer).serve_forever()
"""
    probes: dict[str, Any] = {
        "startupProbe": {"tcpSocket": {"port": 8000}, "failureThreshold": 60, **OFTEN},
        "livenessProbe": {"httpGet": {"path": "/", "port": 8000}, "failureThreshold": 1, **OFTEN},
        "readinessProbe": {"exec": {"command": ["test", "-e", "/tmp/ready"]}, **OFTEN},
    }
    with kubectl.asked(container("python3", "-c", server, **probes)) as pod:
        kubectl.wait(
            lambda: any(one.get("started") for one in pod.status.get("containerStatuses", [])), "started"
        )
        pod.wait_event("Readiness probe failed")
        assert not pod.of()["ready"]
        boot = pod.exec(*BOOT_ID).ok().out
        pod.sh("touch /tmp/ready")
        pod.wait_ready()
        pod.sh("touch /tmp/ill")
        kubectl.wait(lambda: is_running_since(pod, 1), "it was made again")
        assert "Liveness probe failed: HTTP probe failed with statuscode: 500" in "\n".join(pod.events())
        kubectl.wait(lambda: pod.exec(*BOOT_ID).out == boot, "the machine is the same")


@pytest.mark.client(
    "kubectl create (lifecycle (postStart, preStop), terminationGracePeriodSeconds)", "works", ""
)
def test_a_pod_is_told_of_its_end_and_given_the_time_it_asks_for(kubectl: Kubectl, cluster: Cluster) -> None:
    directory = cluster.instance.work / "told"
    directory.mkdir()
    log = directory / "log"

    def say(word: str) -> dict[str, Any]:
        return {"exec": {"command": ["sh", "-c", f"echo {word} >>/told/log"]}}

    volumes = [{"name": "told", "hostPath": {"path": str(directory)}}]
    mounts = [{"name": "told", "mountPath": "/told"}]
    script = "trap 'echo term >>/told/log; exit 0' TERM; while :; do sleep 0.1; done"
    polite = container(
        "sh", "-c", script, volumeMounts=mounts, lifecycle={"postStart": say("up"), "preStop": say("down")}
    )
    with kubectl.pod(polite, volumes=volumes, terminationGracePeriodSeconds=60):
        began = time.monotonic()
    assert time.monotonic() - began < 45
    assert log.read_text().split() == ["up", "down", "term"]
    deaf = container("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")
    with kubectl.pod(deaf, terminationGracePeriodSeconds=4):
        began = time.monotonic()
    assert time.monotonic() - began > 3.5


@pytest.mark.client("kubectl create (the kubelet, or containerd, started anew)", "works", "pods go on")
def test_pods_go_on_while_the_node_is_restarted(kubectl: Kubectl, cluster: Cluster) -> None:
    with kubectl.pod() as pod:
        before = pod.of()
        boot = pod.exec(*BOOT_ID).ok().out
        cluster.stop_kubelet()
        cluster.start_kubelet()
        kubectl.wait(lambda: pod.exec(*BOOT_ID).out == boot, "the kubelet serves again")
        cluster.instance.restart()
        kubectl.wait(lambda: pod.exec(*BOOT_ID).out == boot, "containerd serves again")
        with kubectl.pod():  # others can be made
            pass
        after = pod.of()
        assert after["containerID"] == before["containerID"]
        assert after["restartCount"] == 0


@pytest.mark.client("kubectl create (a pod whose VM ends)", "works", "the kubelet makes another")
def test_a_pod_whose_machine_ends_gets_another(kubectl: Kubectl, cluster: Cluster) -> None:
    with kubectl.pod() as pod:
        boot = pod.exec(*BOOT_ID).ok().out
        [path] = cluster.instance.path("/run/casemate/pods").glob("*/state.json")
        state = json.loads(path.read_text())
        os.kill(state["qemu_pid"], signal.SIGKILL)
        kubectl.wait(lambda: is_running_since(pod, 1), "it was made again")
        assert pod.exec(*BOOT_ID).ok().out != boot


def test_a_command_that_is_not_there_is_said_to_be_missing(kubectl: Kubectl) -> None:
    with kubectl.asked(container("/no/such/program"), restartPolicy="Never") as pod:
        pod.wait_phase("Failed")
        terminated = pod.of()["state"]["terminated"]
        assert terminated["exitCode"] == 128
        assert "/no/such/program" in terminated["message"]
        assert pod.of()["state"]["terminated"]["reason"] == "StartError"


def test_a_job_of_one_command_fails_with_its_status(kubectl: Kubectl) -> None:
    message = container("sh", "-c", "echo why >/dev/termination-log; exit 5")
    with kubectl.asked(message, restartPolicy="Never") as pod:
        pod.wait_phase("Failed")
        terminated = pod.of()["state"]["terminated"]
        assert (terminated["exitCode"], terminated["message"]) == (5, "why\n")
