"""OCI hooks, by which nerdctl and Docker set up a container's network: when, where, told what, and once."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.vm import faults
from tests.vm.hooked import HOST_KINDS, Hooked
from tests.vm.node import Node
from tests.vm.pods import Pods, every_version
from tests.vm.test_network import SEND, SERVE, addresses_of
from tests.vm.test_pool import Pool

WITHIN_S = 30.0
"""A refusal that needs the guest."""


@pytest.fixture
def hooked(pods: Pods) -> Hooked:
    hooked = Hooked(pods.ctr.instance)
    pods.runtime = hooked.runtime
    return hooked


def wait_gone(pods: Pods, name: str) -> None:
    """`delete`, which containerd runs when it notices that the shim is gone, is done."""
    deadline = time.monotonic() + 60
    while pods.paths(name).directory.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.client(
    "hooks prestart, createRuntime, poststart, poststop",
    "works",
    "on the host, in containerd's namespaces, told the specification's state",
)
@every_version
def test_hooks_of_the_host_run_in_their_order_and_are_told_the_state(pods: Pods, hooked: Hooked) -> None:
    instance, name = pods.ctr.instance, pods.ctr.new_id()
    with pods.start("sh", "-c", "echo up; exec sleep 1000", name=name) as running:
        running.read_until(b"up\n", 60)
        hooked.wait("poststart")  # which is beside the program, not before it
        before = hooked.kinds()
        pid = next(int(line.split()[1]) for line in pods.tasks() if line.split()[0] == name)
        network = os.readlink(f"/proc/{pid}/ns/net")
        pods.kill(name)
        running.finish(20)
    assert before == ["prestart", "createRuntime", "poststart"]
    assert hooked.kinds() == list(HOST_KINDS)
    host = {kind: os.readlink(f"/proc/{instance.supervisor_pid}/ns/{kind}") for kind in ("mnt", "net", "pid")}
    status = {
        "prestart": "creating",
        "createRuntime": "creating",
        "poststart": "running",
        "poststop": "stopped",
    }
    for entry in hooked.seen():
        kind, state = entry["kind"], entry["state"]
        bundle = f"/run/containerd/io.containerd.runtime.v2.task/{pods.ctr.namespace}/{name}"
        assert (state["id"], state["status"], state["bundle"]) == (name, status[kind], bundle)
        assert state["ociVersion"].startswith("1.")
        assert state["annotations"]["org.example.given"] == "by the client"
        assert entry["env"] == {"KIND": kind, "LC_ALL": "C"}
        assert entry["cwd"] == bundle
        assert entry["namespaces"] == host
        assert entry["self"], "its own pid is another's in /proc"
        if kind == "poststop":
            assert "pid" not in state
        else:
            assert (state["pid"], entry["pod_net"]) == (pid, network)


def test_hooks_of_one_kind_run_in_the_order_in_which_they_are_listed(pods: Pods, hooked: Hooked) -> None:
    hooked.set({kind: [hooked.tells(kind, str(at)) for at in range(3)] for kind in HOST_KINDS})
    pods.run("true").ok()
    wanted = [[kind, str(at)] for kind in HOST_KINDS for at in range(3)]
    assert [entry["args"] for entry in hooked.seen()] == wanted


def test_a_network_that_a_hook_makes_is_there_before_the_program_and_seen_from_the_host(
    pods: Pods, hooked: Hooked
) -> None:
    """As CNI's plug-ins do it: a pair of interfaces, one of which is moved to the namespace of the pid."""
    add = (
        'pid=$(sed "s/.*\\"pid\\": \\([0-9]*\\).*/\\1/") && '
        "ip link add hook-h type veth peer name hook-c && ip link set hook-c netns $pid && "
        "nsenter -t $pid -n ip addr add 10.9.8.7/24 dev hook-c"
    )
    hooked.set(
        {
            "createRuntime": [hooked.shell(add), hooked.tells("createRuntime")],
            "poststop": [hooked.shell("ip link delete hook-h || true"), hooked.tells("poststop")],
        }
    )
    instance = pods.ctr.instance
    with pods.detached("sleep", "1000"):
        pid = hooked.seen()[0]["state"]["pid"]
        shown = faults.output(
            instance, "nsenter", "-t", str(pid), "-n", "ip", "addr", "show", "dev", "hook-c"
        )
        assert "10.9.8.7/24" in shown
        assert "hook-h" in Path(f"/proc/{instance.supervisor_pid}/net/dev").read_text()
    assert hooked.kinds() == ["createRuntime", "poststop"]


@pytest.mark.client(
    "hooks prestart, createRuntime that fail", "works", "the error has their words; poststop hooks follow"
)
@pytest.mark.parametrize("kind", ["prestart", "createRuntime"])
def test_a_hook_that_fails_fails_the_container_with_its_words(pods: Pods, hooked: Hooked, kind: str) -> None:
    hooked.set(
        {
            kind: [hooked.shell("echo the moon is full >&2; exit 3"), hooked.tells("never")],
            "poststop": [hooked.tells("poststop")],
        }
    )
    faults.refused(
        pods.run("true"), f"{kind} hook /bin/sh", "exit status 3", "the moon is full", within_s=WITHIN_S
    )
    assert hooked.kinds() == ["poststop"], "what a hook had done before was not undone, or undone twice"


@pytest.mark.client("hooks poststart that fail", "works", "the container is ended")
def test_a_poststart_hook_that_fails_ends_the_container(pods: Pods, hooked: Hooked) -> None:
    hooked.set({"poststart": [hooked.shell("echo no >&2; exit 3")], "poststop": [hooked.tells("poststop")]})
    faults.refused(pods.run("sleep", "1000"), "poststart hook /bin/sh", "exit status 3", within_s=WITHIN_S)
    assert hooked.kinds() == ["poststop"]


@pytest.mark.client("hooks poststop that fail", "works", "a line in the log")
def test_a_poststop_hook_that_fails_is_logged_and_the_next_one_runs(pods: Pods, hooked: Hooked) -> None:
    hooked.set({"poststop": [hooked.shell("echo too late >&2; exit 3"), hooked.tells("poststop")]})
    name = pods.ctr.new_id()
    pods.run("true", name=name).ok()
    assert hooked.kinds() == ["poststop"]
    assert "poststop hook /bin/sh" in (pods.ended_directory(name) / "shim.log").read_text()
    assert "too late" in (pods.ended_directory(name) / "shim.log").read_text()


@pytest.mark.client("hooks with a timeout", "works", "killed with all that they started")
def test_a_hook_that_hangs_is_killed_at_its_timeout_with_its_children(pods: Pods, hooked: Hooked) -> None:
    hang = hooked.shell("setsid sleep 1234 & exec sleep 1234", timeout=1)
    hooked.set({"createRuntime": [hang], "poststop": [hooked.tells("poststop")]})
    faults.refused(pods.run("true"), "createRuntime hook", "did not end within 1 s", within_s=WITHIN_S)
    assert hooked.kinds() == ["poststop"]


@pytest.mark.client(
    "hooks that leave a process (as of nerdctl run -p, to hold the port)",
    "works",
    "its pid is the host's, and it outlives the shim",
)
def test_what_a_hook_leaves_behind_outlives_it_and_the_shim(pods: Pods, hooked: Hooked) -> None:
    """As the process by which nerdctl holds a published port, whose pid it writes down."""
    file = pods.ctr.instance.work / "left.pid"
    leave = f"setsid sleep 1000 >/dev/null 2>&1 & echo $! >{file}"
    hooked.set({"createRuntime": [hooked.shell(leave)], "poststop": [hooked.shell(f"kill $(cat {file})")]})
    with pods.detached("sleep", "1000") as name:
        left = int(file.read_text())
        assert faults.runs(left)
        faults.kill_and_wait(faults.shim_pid(pods.ctr.instance))
        wait_gone(pods, name)
        faults.wait_ended(left)  # by poststop


@pytest.mark.client("hooks poststop of a killed shim", "works", "by `delete`, once")
@every_version
def test_the_hooks_of_a_killed_shim_are_run_by_delete_and_once(pods: Pods, hooked: Hooked) -> None:
    with pods.detached("sleep", "1000") as name:
        faults.kill_and_wait(faults.shim_pid(pods.ctr.instance))
        hooked.wait("poststop")
        wait_gone(pods, name)
    assert hooked.kinds() == list(HOST_KINDS)
    last = hooked.seen()[-1]
    assert last["state"]["status"] == "stopped"
    assert last["env"] == {"KIND": "poststop", "LC_ALL": "C"}


def test_a_shim_that_is_killed_while_a_hook_runs_takes_the_hook_along(pods: Pods, hooked: Hooked) -> None:
    began = pods.ctr.instance.work / "began"
    hooked.set(
        {
            "createRuntime": [hooked.shell(f"echo $$ >{began}.new; mv {began}.new {began}; exec sleep 1000")],
            "poststop": [hooked.tells("poststop")],
        }
    )
    with pods.start("true") as running:
        faults.wait_path(began)
        hook = int(began.read_text())
        faults.kill_and_wait(faults.shim_pid(pods.ctr.instance))
        assert running.finish(20).code != 0
        hooked.wait("poststop")
    faults.wait_ended(hook)
    assert hooked.kinds() == ["poststop"]


def test_a_container_that_is_never_made_leaves_no_process_that_waits(pods: Pods, hooked: Hooked) -> None:
    """`start` left one to run its hooks, and its network is refused before anybody asks it to."""
    faults.refused(pods.run("true", options=("--net-host",)), "host network", within_s=WITHIN_S)
    assert hooked.seen() == []


def test_hooks_that_are_none_are_refused(pods: Pods, hooked: Hooked) -> None:
    hooked.set({"createRuntime": [{"path": "relative"}]})
    faults.refused(
        pods.run("true"), "hooks.createRuntime[0].path 'relative' is not absolute", within_s=WITHIN_S
    )
    hooked.set({"prelunch": [{"path": "/bin/true"}]})
    faults.refused(pods.run("true"), "hooks prelunch: not known", within_s=WITHIN_S)
    hooked.set({"createRuntime": [{"path": "/no/such/program"}]})
    faults.refused(pods.run("true"), "/no/such/program", "No such file", within_s=WITHIN_S)


@pytest.mark.client(
    "CNI bridge, host-local in a createRuntime hook (as of nerdctl run --net bridge)",
    "works",
    "the guest has the address, and answers there",
)
def test_the_networks_of_cni_as_nerdctl_makes_them(pods: Pods, hooked: Hooked) -> None:
    """A bridge and an address of host-local's by CNI's own plug-ins, whose interface the guest answers at."""
    instance = pods.ctr.instance
    with hooked.bridge("10.87.9.0/24"):
        with pods.start("python3", "-c", SERVE, "10.87.9.2") as running:
            running.read_until(b"serving\n", 60)
            (made,) = hooked.seen()
            pid = made["state"]["pid"]
            shown = faults.output(instance, "nsenter", "-t", str(pid), "-n", "ip", "-json", "address")
            assert addresses_of(json.loads(shown))["eth0"] >= {("10.87.9.2", 24)}
            sent = faults.output(instance, sys.executable, "-c", SEND, "10.87.9.2", "100000")
            assert sent == "100000 from 10.87.9.1\n"
            assert running.finish(20).code == 0
        assert hooked.kinds() == ["createRuntime", "poststop"]
        assert hooked.leases() == []


def test_two_containers_of_one_pod_have_their_own_hooks(pods: Pods, hooked: Hooked) -> None:
    """The second one's `start` finds the shim of the first, which was not told of its hooks before."""
    group = pods.ctr.new_id()
    hooked.annotations = {"io.containerd.runc.v2.group": group}
    argv = pods.argv(group, ("sleep", "1000"), ("--detach",))
    pods.ctr(*argv).ok()
    try:
        pods.run("true").ok()
        ids = [(entry["state"]["id"] == group, entry["kind"]) for entry in hooked.seen()]
        first = [(True, kind) for kind in HOST_KINDS[:-1]]
        assert ids == [*first, *((False, kind) for kind in HOST_KINDS)]
    finally:
        pods.remove(group)
    assert hooked.kinds()[-1] == "poststop"


def test_a_machine_of_the_pool_has_hooks_run_as_any_other(pods: Pods, hooked: Hooked) -> None:
    pool = Pool(pods, Node(pods.ctr.instance))
    try:
        pool.start()
        hooked.log.unlink()
        with pods.detached("sleep", "1000") as name:
            assert pods.state(name)["source"] == "pool"
            host = os.readlink(f"/proc/{pods.ctr.instance.supervisor_pid}/ns/pid")
            for entry in hooked.seen():
                assert entry["namespaces"]["pid"] == host
                assert entry["pod_net"] == os.readlink(f"/proc/{entry['state']['pid']}/ns/net")
            faults.kill_and_wait(faults.shim_pid(pods.ctr.instance))
            hooked.wait("poststop")
            wait_gone(pods, name)
        assert hooked.kinds() == list(HOST_KINDS)
    finally:
        pool.node.close()
        pool.wait_gone()


@pytest.mark.client("hooks startContainer", "works", "in the guest, by crun")
def test_a_start_container_hook_is_a_program_of_the_containers(pods: Pods, hooked: Hooked) -> None:
    started = {"path": "/bin/sh", "args": ["sh", "-c", "cat >/state"], "env": ["PATH=/usr/bin:/bin"]}
    hooked.set({"startContainer": [started]})
    state = json.loads(pods.run("cat", "/state").ok().out)
    assert state["annotations"]["org.example.given"] == "by the client"
    assert state["status"] in ("created", "starting"), "the latter is crun's word for it"
    assert state["id"]


@pytest.mark.client(
    "hooks createContainer of a program of the host", "refused", "it has to be one of the guest image's"
)
def test_hooks_of_the_guest_whose_programs_are_not_there_are_refused(pods: Pods, hooked: Hooked) -> None:
    hooked.set({"createContainer": [{"path": hooked.witness}], "poststop": [hooked.tells("poststop")]})
    words = ("createContainer hook", hooked.witness, "in the guest image", "prestart and createRuntime")
    faults.refused(pods.run("true"), *words, within_s=WITHIN_S)
    hooked.set({"startContainer": [{"path": "/no/such/program"}]})
    faults.refused(pods.run("true"), "startContainer hook /no/such/program", within_s=WITHIN_S)
    assert hooked.kinds() == ["poststop"]
