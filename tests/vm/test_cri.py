"""Pods of several containers, through containerd's CRI with crictl: what the kubelet would do with them."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench.instance import RUNTIME, Instance
from config import annotations
from tests.vm import builds, census
from tests.vm import cri as support
from tests.vm.census import CGROUPS
from tests.vm.cri import OWN_PIDS, POD_PIDS, Cri, failure, mount
from tests.vm.node import Node
from tests.vm.pods import FULL, MOUNT, Pods, prepare
from tests.vm.test_pool import Pool

BOOT_ID = ("cat", "/proc/sys/kernel/random/boot_id")
FOREVER = ("sleep", "1000")

every_cri = pytest.mark.parametrize("cri_instance", list(builds.VERSIONS), indirect=True)


def hierarchies() -> list[Path]:
    """Of cgroups: those of version 1, and the one of version 2 beside them or alone."""
    if (CGROUPS / "cgroup.procs").exists():
        return [CGROUPS]
    return [top for top in CGROUPS.iterdir() if (top / "cgroup.procs").exists() and not top.is_symlink()]


class CriInstances:
    def __init__(self, demo: Path, store: Path) -> None:
        self.demo = demo
        self.store = store
        self.running: dict[str, Instance] = {}

    def get(self, name: str) -> Instance:
        if name not in self.running:
            try:
                instance = support.start(name)
            except builds.NotHereError as reason:
                pytest.skip(str(reason))
            self.running[name] = instance
            prepare(instance, self.demo, self.store)
            cri = Cri(instance)
            cri.ctr.import_image(self.demo)
            with cri.pod() as pod:  # what containerd and its network open once in their lives is open then
                pod.run("true")
        return self.running[name]

    def discard(self, instance: Instance) -> None:
        self.running = {name: other for name, other in self.running.items() if other is not instance}
        instance.close()

    def close(self) -> None:
        while self.running:
            self.running.popitem()[1].close()
        for top in hierarchies():
            with suppress(FileNotFoundError):
                (top / support.CGROUPS[1:]).rmdir()


@pytest.fixture(scope="module")
def cri_instances(demo_archive: Path, image_store: Path) -> Iterator[CriInstances]:
    instances = CriInstances(demo_archive, image_store)
    yield instances
    instances.close()


@pytest.fixture
def cri_instance(request: pytest.FixtureRequest, cri_instances: CriInstances) -> Instance:
    return cri_instances.get(getattr(request, "param", FULL))


@pytest.fixture
def cri(cri_instance: Instance, cri_instances: CriInstances) -> Iterator[Cri]:
    """crictl with a census before and after: whatever the test leaves behind fails it."""
    cri = Cri(cri_instance)
    before = census.take(cri.ctr)
    yield cri
    cri_instance.clear_config()
    left = census.left_after(cri.ctr, before)
    if left:
        log = cri_instance.log_tail()
        cri_instances.discard(cri_instance)
        pytest.fail("left behind:\n" + "\n".join(left) + "\n" + log)


SERVE = """\
import socket
with socket.create_server(("0.0.0.0", 8000)) as server:
    while True:
        connection, peer = server.accept()
        with connection:
            connection.sendall(b"from " + peer[0].encode())
"""
FETCH = """\
import socket, sys, time
for _ in range(100):
    try:
        with socket.create_connection((sys.argv[1], 8000), timeout=20) as connection:
            print(connection.recv(1000).decode())
            break
    except ConnectionRefusedError:  # the other program is being started
        time.sleep(0.1)
else:
    sys.exit(1)
"""


ECHO = """\
import socket, threading
def answer(connection):
    with connection:
        while data := connection.recv(65536):
            connection.sendall(data)
with socket.create_server(("127.0.0.1", 8000)) as server:
    print("listening", flush=True)
    while True:
        threading.Thread(target=answer, args=server.accept()[:1]).start()
"""
ASK = """\
import socket, sys, threading
sent = bytes(range(256)) * (int(sys.argv[2]) // 256) + b"x" * (int(sys.argv[2]) % 256)
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=50) as connection:
    threading.Thread(target=connection.sendall, args=(sent,)).start()
    got = b""
    while len(got) < len(sent) and (data := connection.recv(65536)):
        got += data
assert got in (sent, b"")
print(len(got), "came back")
"""


@pytest.fixture
def pod_cgroup() -> Iterator[str]:
    """A cgroup for a pod in every hierarchy, as the kubelet makes it before the pod."""
    name = f"{support.CGROUPS}/pod"
    made = [top / name[1:] for top in hierarchies()]
    for path in made:
        path.mkdir(parents=True)
    yield name
    for path in made:
        path.rmdir()


@every_cri
@pytest.mark.client("crictl runp, create, start (several containers)", "works", "in one VM")
def test_containers_of_a_pod_share_a_machine_and_keep_their_files_to_themselves(cri: Cri) -> None:
    with cri.pod() as pod:
        one, two = pod.run(*FOREVER), pod.run(*FOREVER)
        boots = {pod.exec(container, *BOOT_ID).ok().out for container in (one, two)}
        assert len(boots) == 1
        assert boots != {Path("/proc/sys/kernel/random/boot_id").read_text()}
        pod.exec(one, "sh", "-c", "echo one > /mark").ok()
        assert "No such file" in failure(pod.exec(two, "cat", "/mark"))
        assert {item["id"] for item in pod.state["containers"]} == {pod.id, one, two}
        assert sum(item["state"] == "running" for item in pod.state["containers"]) == 3


@every_cri
@pytest.mark.client("crictl stop, rm, inspect", "works", "the VM outlives every container but the sandbox")
def test_a_container_ends_and_is_made_again_while_the_other_one_runs_on(cri: Cri) -> None:
    with cri.pod() as pod:
        steady = pod.run("sh", "-c", "echo $$ > /started; exec sleep 1000")
        boot = pod.exec(steady, *BOOT_ID).ok().out
        for code in (3, 0):
            container = pod.run("sh", "-c", f"echo said {code}; exit {code}", name="again")
            status = pod.ended(container)
            assert status["exitCode"] == code
            assert pod.log(container) == f"said {code}\n"
            cri("rm", container).ok()
        killed = pod.run(*FOREVER, name="again")
        cri("stop", "--timeout=0", killed).ok()
        assert pod.ended(killed)["exitCode"] == 137
        cri("rm", killed).ok()
        assert pod.status(steady)["state"] == "CONTAINER_RUNNING"
        assert pod.exec(steady, *BOOT_ID).ok().out == boot
        cri("rm", "--force", steady).ok()
        assert pod.is_ready
        assert pod.exec(pod.run(*FOREVER), *BOOT_ID).ok().out == boot


def test_an_init_container_leaves_its_work_to_the_others(cri: Cri) -> None:
    volume = cri.work / "init-volume"
    volume.mkdir()
    with cri.pod() as pod:
        prepared = pod.run("sh", "-c", "echo ready > /work/state", mounts=[mount(volume, "/work")])
        assert pod.ended(prepared)["exitCode"] == 0
        main = pod.run("cat", "/work/state", mounts=[mount(volume, "/work", read_only=True)])
        assert pod.ended(main)["exitCode"] == 0
        assert pod.log(main) == "ready\n"


@every_cri
@pytest.mark.client(
    "crictl create (volumes of several containers)", "works", "by virtio-fs, a memory-backed emptyDir too"
)
def test_volumes_are_seen_by_all_containers_that_have_them(cri: Cri) -> None:
    directory, memory = cri.work / "volume", cri.work / "memory"
    for path in (directory, memory):
        path.mkdir(exist_ok=True)
    subprocess.run(
        cri.instance.inside("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(memory)), check=True
    )
    try:
        mounts = [mount(directory, "/dir"), mount(memory, "/memory")]
        with cri.pod() as pod:
            one, two = pod.run(*FOREVER, mounts=mounts), pod.run(*FOREVER, mounts=mounts)
            for place in ("/dir", "/memory"):
                pod.exec(one, "sh", "-c", f"echo from one > {place}/file; mkdir {place}/sub").ok()
                assert pod.exec(two, "cat", f"{place}/file").ok().out == "from one\n"
                pod.exec(two, "sh", "-c", f"echo and two >> {place}/file; rmdir {place}/sub").ok()
                read = pod.exec(one, "sh", "-c", f"cat {place}/file; ls -A {place}").ok().out
                assert read == "from one\nand two\nfile\n"
            assert (directory / "file").read_text() == "from one\nand two\n"
            assert cri.instance.path(memory / "file").read_text() == "from one\nand two\n"
    finally:
        subprocess.run(cri.instance.inside("umount", str(memory)), check=True)


@pytest.mark.client("crictl create (subPath)", "works", "")
def test_a_part_of_a_volume_is_a_directory_or_a_single_file(cri: Cri) -> None:
    """As subPath: the kubelet binds what is below a volume."""
    volume = cri.work / "parts"
    (volume / "inner").mkdir(parents=True)
    (volume / "inner" / "deep").write_text("deep\n")
    (volume / "alone").write_text("alone\n")
    (volume / "secret").write_text("of another\n")
    mounts = [
        mount(volume / "inner", "/part"),
        mount(volume / "alone", "/etc/alone", read_only=True),
        mount(volume / "alone", "/etc/writable"),
    ]
    with cri.pod() as pod:
        container = pod.run(*FOREVER, mounts=mounts)
        assert pod.exec(container, "ls", "-A", "/part").ok().out == "deep\n"
        assert pod.exec(container, "cat", "/part/deep", "/etc/alone").ok().out == "deep\nalone\n"
        assert "Read-only" in failure(pod.exec(container, "sh", "-c", "echo x >> /etc/alone"))
        pod.exec(container, "sh", "-c", "echo more >> /etc/writable").ok()
        assert (volume / "alone").read_text() == "alone\nmore\n"
        assert pod.exec(container, "cat", "/etc/alone").ok().out == "alone\nmore\n"


def test_what_is_mounted_on_the_host_after_the_pod_began_is_there_for_its_next_container(cri: Cri) -> None:
    """The kubelet mounts a subPath when it makes the container; this host's mounts are private."""
    place = cri.work / "late"
    (place / "below").mkdir(parents=True)
    with cri.pod() as pod:
        for path in (place, place / "below"):
            subprocess.run(cri.instance.inside("mount", "-t", "tmpfs", "late", str(path)), check=True)
            if path == place:
                cri.instance.path(place / "below").mkdir()
        try:
            cri.instance.path(place / "file").write_text("late\n")
            cri.instance.path(place / "below" / "file").write_text("below\n")
            container = pod.run("cat", "/late/file", "/late/below/file", mounts=[mount(place, "/late")])
            assert pod.ended(container)["exitCode"] == 0
            assert pod.log(container) == "late\nbelow\n"
            cri("rm", container).ok()
        finally:
            for path in (place / "below", place):
                subprocess.run(cri.instance.inside("umount", str(path)), check=True)


@every_cri
@pytest.mark.client("crictl create (ConfigMap, Secret)", "works", "swapped while it runs")
def test_a_config_volume_that_is_swapped_is_seen_by_the_running_container(cri: Cri) -> None:
    """The kubelet writes a new directory and renames a link to it over the old one."""
    volume = cri.work / "config"
    for version in ("one", "two"):
        (volume / f"..{version}").mkdir(parents=True, exist_ok=True)
        (volume / f"..{version}" / "app.conf").write_text(f"{version}\n")
    (volume / "..data").symlink_to("..one")
    (volume / "app.conf").symlink_to("..data/app.conf")
    wait = (
        "cat /config/app.conf; until grep -q two /config/app.conf; do sleep 0.1; done; cat /config/app.conf"
    )
    with cri.pod() as pod:
        container = pod.run("sh", "-c", wait, mounts=[mount(volume, "/config", read_only=True)])
        assert pod.exec(container, "cat", "/config/app.conf").ok().out == "one\n"
        (volume / "..next").symlink_to("..two")
        os.rename(volume / "..next", volume / "..data")
        (volume / "..one" / "app.conf").unlink()
        (volume / "..one").rmdir()
        assert pod.ended(container)["exitCode"] == 0
        assert pod.log(container) == "one\ntwo\n"


@every_cri
@pytest.mark.client(
    "crictl create (process IDs of the pod)", "works", "PID 1 is not the pause image's program"
)
def test_process_ids_are_each_containers_own_or_the_pods(cri: Cri) -> None:
    with cri.pod() as pod:
        own = pod.run(*FOREVER)
        assert pod.exec(own, "cat", "/proc/1/comm").ok().out == "sleep\n"
        shared = pod.run("sh", "-c", "sleep 1001; exit 4", linux=POD_PIDS)
        other = pod.run("sleep", "1002", linux=POD_PIDS)
        seen = pod.exec(shared, "ps", "-eo", "comm=").ok().out.split()
        assert sorted(seen) == ["pause", "ps", "sh", "sleep", "sleep"]
        pod.exec(other, "pkill", "-f", "^sleep 1001$").ok()  # another container's process
        assert pod.ended(shared)["exitCode"] == 4
        assert pod.exec(other, "sh", "-c", "kill -9 1; cat /proc/1/comm").ok().out == "pause\n"
        assert pod.exec(own, "ps", "-eo", "comm=").ok().out.split() == ["sleep", "ps"]
        cri("stop", "--timeout=0", other).ok()
        again = pod.run("cat", "/proc/1/comm", linux=POD_PIDS)
        pod.ended(again)
        assert pod.log(again) == "pause\n"


@pytest.mark.client("crictl create (process IDs of a target)", "works", "")
def test_a_debugging_container_joins_the_process_ids_of_its_target(cri: Cri) -> None:
    """As an ephemeral container with a target: NamespaceMode TARGET is 3."""
    with cri.pod() as pod:
        target = pod.run(*FOREVER)
        options = {"pid": 3, "target_id": target}
        debug = pod.run(*FOREVER, linux={"security_context": {"namespace_options": options}})
        seen = pod.exec(debug, "ps", "-eo", "pid=,comm=").ok().out.split()
        assert seen[:2] == ["1", "sleep"]
        assert seen.count("sleep") == 2


SHM_WRITER = """\
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory("between", create=True, size=4096)
memory.buf[:5] = b"hello"
import time; print("written", flush=True); time.sleep(1000)
"""


@every_cri
@pytest.mark.client("crictl runp (host name, IPC, /dev/shm, sysctls)", "works", "in the guest")
def test_containers_of_a_pod_have_one_host_name_ipc_and_shared_memory(cri: Cri) -> None:
    sysctls = {
        "kernel.shm_rmid_forced": "1",
        "net.ipv4.tcp_keepalive_time": "600",
        "kernel.msgmax": "9000",
        "net.ipv4.conf.eth0.arp_notify": "1",
    }
    options = {**OWN_PIDS, "sysctls": sysctls}
    with cri.pod(hostname="keep-tower", linux=options) as pod:
        one = pod.run("python3", "-c", SHM_WRITER)
        two = pod.run(*FOREVER)
        for container in (one, two):
            assert pod.exec(container, "hostname").ok().out == "keep-tower\n"
            for name, value in sysctls.items():
                assert (
                    pod.exec(container, "cat", f"/proc/sys/{name.replace('.', '/')}").ok().out == f"{value}\n"
                )
        shm = pod.exec(two, "sh", "-c", "head -c 5 /dev/shm/between; stat -f -c ' %T' /dev/shm").ok().out
        assert shm == "hello tmpfs\n"
        limits = pod.exec(two, "df", "-B1", "--output=size", "/dev/shm").ok().out.split()
        assert limits[-1] == str(64 << 20)
        ipc, uts = ("readlink", "/proc/self/ns/ipc"), ("readlink", "/proc/self/ns/uts")
        for namespace in (ipc, uts):
            assert pod.exec(one, *namespace).ok().out == pod.exec(two, *namespace).ok().out
        # Nothing of it is on the host, where the sandbox has a directory of this size for it.
        assert (
            list(cri.instance.path("/run/containerd/io.containerd.grpc.v1.cri/sandboxes").glob("*/shm/*"))
            == []
        )


@pytest.mark.client("crictl runp (host's network, PID or IPC namespace)", "refused", "a VM has its own")
def test_what_a_pod_may_not_have_is_refused_with_a_reason(cri: Cri) -> None:
    node = 2
    for kind, words in (("network", "host network"), ("pid", "host PID"), ("ipc", "host IPC")):
        namespaces: dict[str, Any] = {"namespace_options": {"pid": 1, kind: node}}
        config = cri.write(
            f"host-{kind}", metadata=support.metadata(f"host-{kind}"), linux={"security_context": namespaces}
        )
        said = failure(cri("runp", "--runtime=casemate", str(config)))
        assert words in said


@every_cri
@pytest.mark.client("crictl exec, exec -it, logs, attach, stats, inspectp", "works", "")
def test_exec_logs_attach_and_statistics(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.run("cat", stdin=True)
        failed = pod.exec(container, "sh", "-c", "echo out; echo err >&2; exit 5")
        assert failed.code != 0
        assert "exited with 5: err" in failed.err
        with cri.terminal(
            "exec", "-it", container, "sh", "-c", "tty -s && echo is-tty; stty size"
        ) as terminal:
            terminal.expect(rb"is-tty", 30)
        with cri.start("attach", "--stdin", container) as attached:
            attached.write(b"through\n")
            assert attached.read_until(b"through\n", 30) == b"through\n"
        assert "through" in pod.log(container)
        [stats] = cri.json("stats", "--output=json", "--id", container)["stats"]
        assert int(stats["memory"]["workingSetBytes"]["value"]) > 0
        assert int(stats["cpu"]["usageCoreNanoSeconds"]["value"]) > 0
        assert pod.is_ready


@every_cri
@pytest.mark.client("crictl runp (CNI, dns_config)", "works", "")
def test_a_pod_has_the_address_that_its_network_gave_it(cri: Cri) -> None:
    dns = {"servers": ["192.0.2.53"], "searches": ["tests.example"]}
    with cri.pod(dns_config=dns) as server, cri.pod() as client:
        address = cri.json("inspectp", server.id)["status"]["network"]["ip"]
        listening = server.run("python3", "-c", SERVE)
        beside = server.run("python3", "-c", FETCH, "127.0.0.1")
        assert server.ended(beside)["exitCode"] == 0
        assert server.log(beside) == "from 127.0.0.1\n"
        far = client.run("python3", "-c", FETCH, address)
        assert client.ended(far)["exitCode"] == 0, client.log(far)
        own = cri.json("inspectp", client.id)["status"]["network"]["ip"]
        assert client.log(far) == f"from {own}\n"
        shown = server.exec(listening, "cat", "/etc/hosts", "/etc/resolv.conf").ok().out
        assert "127.0.0.1" in shown
        assert "nameserver 192.0.2.53" in shown


@every_cri
@pytest.mark.client("crictl port-forward", "works", "where nobody listens, a connection is made and closed")
def test_a_port_of_the_pod_is_forwarded_to(cri: Cri) -> None:
    with cri.pod() as pod:
        listening = pod.run("python3", "-c", ECHO)
        cri.wait(lambda: pod.log(listening) == "listening\n", "the program listens")
        with cri.start("port-forward", pod.id, ":8000", ":8001") as forwarding:
            words = forwarding.read_until(b"-> 8001", 30).decode()
            open_port, closed_port = re.findall(r"127\.0\.0\.1:(\d+) ->", words)
            for size in (1, 3_000_000):
                said = subprocess.run(
                    cri.instance.inside("python3", "-c", ASK, open_port, str(size)),
                    capture_output=True, timeout=60, check=True, text=True,
                )  # fmt: skip
                assert said.stdout == f"{size} came back\n"
            nothing = cri.instance.inside("python3", "-c", ASK, closed_port, "1")
            refused = subprocess.run(nothing, capture_output=True, timeout=60, check=False, text=True)
            assert "came back" not in refused.stdout.replace("0 came back", "")
        assert pod.exec(listening, "true").code == 0


@every_cri
@pytest.mark.client("crictl update, create (limits)", "works", "OOMKilled where memory is exceeded")
def test_a_container_beyond_its_memory_is_killed_and_said_to_have_been(cri: Cri) -> None:
    limits = {"resources": {"memory_limit_in_bytes": 64 << 20, "cpu_quota": 50_000, "cpu_period": 100_000}}
    with cri.pod() as pod:
        steady = pod.run(*FOREVER, linux={**OWN_PIDS, **limits})
        shown = pod.exec(steady, "cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max").ok().out
        assert shown == f"{64 << 20}\n50000 100000\n"
        cri("update", "--memory", str(80 << 20), "--cpu-quota", "70000", steady).ok()
        shown = pod.exec(steady, "cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max").ok().out
        assert shown == f"{80 << 20}\n70000 100000\n"
        greedy = pod.run("python3", "-c", "bytearray(200 << 20)", linux={**OWN_PIDS, **limits})
        status = pod.ended(greedy)
        assert (status["exitCode"], status["reason"]) == (137, "OOMKilled")
        assert pod.status(steady)["state"] == "CONTAINER_RUNNING"


def test_limits_of_the_pod_beyond_its_machine_are_named(cri: Cri) -> None:
    resources = {"memory_limit_in_bytes": 64 << 30, "cpu_quota": 6_400_000, "cpu_period": 100_000}
    with cri.pod(linux={**OWN_PIDS, "resources": resources}) as pod:
        log = pod.paths.log.read_text()
    assert "memory.limit is 65536 MiB, but the whole VM has" in log
    assert "cpu.quota is 64 CPUs, but the whole VM has" in log


def test_the_pods_annotations_choose_its_machine(cri: Cri) -> None:
    cri.instance.configure('allowed_annotations = ["dev.casemate.vcpus"]\n')
    with cri.pod(annotations={annotations.VCPUS: "2"}) as pod:
        assert pod.exec(pod.run(*FOREVER), "nproc").ok().out == "2\n"


@pytest.mark.client("crictl statsp", "works", "what QEMU, virtiofsd and the shim use")
def test_the_pods_cgroup_holds_its_machine(cri: Cri, pod_cgroup: str) -> None:
    with cri.pod(linux={**OWN_PIDS, "cgroup_parent": pod_cgroup}) as pod:
        pod.run(*FOREVER)
        [stats] = cri.json("statsp", "--output=json", "--id", pod.id)["stats"]
        used = int(stats["linux"]["memory"]["usageBytes"]["value"])
        assert used > 50 << 20
        for process in ("pid", "qemu_pid", "virtiofsd_pid"):
            assert f"{pod_cgroup}/casemate-" in Path(f"/proc/{pod.state[process]}/cgroup").read_text()


@pytest.mark.client("crictl create (security context)", "works", "")
def test_what_a_security_context_asks_for_holds_in_the_guest(cri: Cri) -> None:
    context = {
        **OWN_PIDS["security_context"],
        "run_as_user": {"value": 1000},
        "run_as_group": {"value": 1001},
        "supplemental_groups": [1002],
        "readonly_rootfs": True,
        "no_new_privs": True,
        "seccomp": {"profile_type": 0},
        "capabilities": {"drop_capabilities": ["ALL"]},
        "masked_paths": ["/proc/meminfo"],
        "readonly_paths": ["/proc/sys"],
    }
    with cri.pod() as pod:
        container = pod.run(*FOREVER, linux={"security_context": context})
        assert pod.exec(container, "id", "-u").ok().out == "1000\n"
        assert pod.exec(container, "id", "-G").ok().out == "1001 1002\n"
        status = pod.exec(
            container, "grep", "-E", "^(CapEff|CapBnd|NoNewPrivs|Seccomp):", "/proc/self/status"
        )
        found = dict(line.split(":\t") for line in status.ok().out.splitlines())
        assert found == {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
        assert "Read-only file system" in failure(pod.exec(container, "touch", "/new"))
        assert pod.exec(container, "cat", "/proc/meminfo").ok().out == ""


@every_cri
@pytest.mark.client("crictl create (privileged)", "differs", "in its own VM, without the host's devices")
def test_a_privileged_container_is_so_in_its_own_machine(cri: Cri) -> None:
    privileged = {"security_context": {**OWN_PIDS["security_context"], "privileged": True}}
    with cri.pod(linux=privileged) as pod:
        container = pod.run(*FOREVER, linux=privileged)
        pod.exec(container, "python3", "-c", MOUNT).ok()
        pod.exec(container, "sh", "-c", "echo 1 > /proc/sys/vm/overcommit_memory").ok()
        assert "No such file" in failure(pod.exec(container, "ls", "/dev/kvm"))
        assert pod.exec(container, *BOOT_ID).ok().out != Path("/proc/sys/kernel/random/boot_id").read_text()


def test_a_pod_takes_a_machine_that_waited_for_pods_like_it(cri: Cri) -> None:
    """On a host whose mounts are shared, as systemd has it: what CNI mounts reaches a machine that waits."""
    propagate = cri.instance.inside("mount", "--make-rshared", "/")
    subprocess.run(propagate, check=True)
    node = Node(cri.instance)
    pool = Pool(Pods(cri.ctr, RUNTIME, support.IMAGE), node)
    try:
        pool.start(learn=False)
        others = pool.ready()
        with cri.pod() as first:
            assert first.state["source"] == "restore"
        pool.wait_full(but_like=others)
        with cri.pod() as second:
            assert second.state["source"] == "pool"
            one, two = second.run(*FOREVER), second.run(*FOREVER)
            for container in (one, two):
                assert second.exec(container, "hostname").ok().out == f"{second.config['hostname']}\n"
    finally:
        node.close()
        pool.wait_gone()
        subprocess.run(cri.instance.inside("mount", "--make-rprivate", "/"), check=True)


def test_a_pod_whose_machine_dies_is_over_and_can_be_removed(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.run(*FOREVER)
        os.kill(pod.state["qemu_pid"], signal.SIGKILL)
        assert pod.ended(container)["exitCode"] == 137
        pod.over()


@pytest.mark.client(
    "crictl runp (the sandbox container)", "differs", "its program is not run, only accounted for"
)
def test_what_is_done_to_the_sandbox_itself_is_done_to_the_pod(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.run(*FOREVER)
        exec_ = cri.ctr("task", "exec", "--exec-id", "e", pod.id, "true")
        assert "nothing of it runs in the virtual machine" in failure(exec_)
        cri.ctr("task", "kill", "--signal", "SIGUSR1", pod.id).ok()
        assert pod.is_ready
        qemu = pod.state["qemu_pid"]
        pid = next(item["pid"] for item in pod.state["containers"] if item["id"] == pod.id)
        os.kill(pid, signal.SIGKILL)
        assert pod.ended(container)["exitCode"] == 137
        assert not Path(f"/proc/{qemu}").exists()
        pod.over()


@every_cri
def test_a_pod_goes_on_while_containerd_is_away(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.run(*FOREVER)
        cri.instance.restart()
        cri.wait_ready()
        assert pod.status(container)["state"] == "CONTAINER_RUNNING"
        pod.exec(container, "true").ok()
        assert pod.exec(pod.run(*FOREVER), "hostname").ok().out == f"{pod.config['hostname']}\n"


def test_a_pod_whose_shim_is_killed_is_over_and_can_be_removed(cri: Cri) -> None:
    with cri.pod() as pod:
        container, late = pod.run(*FOREVER), pod.create("true")
        os.kill(pod.state["pid"], signal.SIGKILL)
        assert pod.ended(container)["state"] == "CONTAINER_EXITED"
        said = failure(cri("start", late))
        assert re.search("no virtual machine any more|sandbox container .* is not running", said), said
