"""What containers of pods are given, through CRI with crictl: volumes, networks, limits, rights."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from config import annotations
from tests.vm import cri as support
from tests.vm.cri import BOOT_ID, FOREVER, OWN_PIDS, Cri, CriInstances, CriPod, failure, hierarchies, mount
from tests.vm.pods import FORBIDDEN, FULL, MOUNT

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


@pytest.fixture(scope="module")
def shared_pod(cri_instances: CriInstances) -> Iterator[CriPod]:
    """For tests that do not mind which containers there were before theirs."""
    with Cri(cri_instances.get(FULL)).pod() as pod:
        if support.HANDLER == support.SHIM_HANDLER:  # a sandbox of its has nothing to tell before
            pod.run("true")
            pod.clear()
        yield pod


@pytest.fixture
def pod(shared_pod: CriPod, cri: Cri) -> Iterator[CriPod]:
    yield shared_pod
    shared_pod.clear()


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


def test_an_init_container_leaves_its_work_to_the_others(cri: Cri, pod: CriPod) -> None:
    volume = cri.work / "init-volume"
    volume.mkdir()
    prepared = pod.run("sh", "-c", "echo ready > /work/state", mounts=[mount(volume, "/work")])
    assert pod.ended(prepared)["exitCode"] == 0
    main = pod.run("cat", "/work/state", mounts=[mount(volume, "/work", read_only=True)])
    assert pod.ended(main)["exitCode"] == 0
    assert pod.log(main) == "ready\n"


@pytest.mark.client(
    "crictl create (volumes of several containers)", "works", "by virtio-fs, a memory-backed emptyDir too"
)
def test_volumes_are_seen_by_all_containers_that_have_them(cri: Cri, pod: CriPod) -> None:
    directory, memory = cri.work / "volume", cri.work / "memory"
    for path in (directory, memory):
        path.mkdir(exist_ok=True)
    subprocess.run(
        cri.instance.inside("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(memory)), check=True
    )
    try:
        mounts = [mount(directory, "/dir"), mount(memory, "/memory")]
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
def test_a_part_of_a_volume_is_a_directory_or_a_single_file(cri: Cri, pod: CriPod) -> None:
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
    container = pod.run(*FOREVER, mounts=mounts)
    assert pod.exec(container, "ls", "-A", "/part").ok().out == "deep\n"
    assert pod.exec(container, "cat", "/part/deep", "/etc/alone").ok().out == "deep\nalone\n"
    assert "Read-only" in failure(pod.exec(container, "sh", "-c", "echo x >> /etc/alone"))
    pod.exec(container, "sh", "-c", "echo more >> /etc/writable").ok()
    assert (volume / "alone").read_text() == "alone\nmore\n"
    assert pod.exec(container, "cat", "/etc/alone").ok().out == "alone\nmore\n"


def test_what_is_mounted_on_the_host_after_the_pod_began_is_there_for_its_next_container(
    cri: Cri, pod: CriPod
) -> None:
    """The kubelet mounts a subPath when it makes the container; this host's mounts are private."""
    place = cri.work / "late"
    (place / "below").mkdir(parents=True)
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


@pytest.mark.client("crictl create (ConfigMap, Secret)", "works", "swapped while it runs")
def test_a_config_volume_that_is_swapped_is_seen_by_the_running_container(cri: Cri, pod: CriPod) -> None:
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
    container = pod.run("sh", "-c", wait, mounts=[mount(volume, "/config", read_only=True)])
    assert pod.exec(container, "cat", "/config/app.conf").ok().out == "one\n"
    cri.wait(lambda: pod.log(container) == "one\n", "the container has read it")
    (volume / "..next").symlink_to("..two")
    os.rename(volume / "..next", volume / "..data")
    (volume / "..one" / "app.conf").unlink()
    (volume / "..one").rmdir()
    assert pod.ended(container)["exitCode"] == 0
    assert pod.log(container) == "one\ntwo\n"


@pytest.mark.client("crictl runp (CNI, dns_config)", "works", "")
@pytest.mark.client("crictl statsp (network)", "works", "what the pod's interface on the host carried")
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
        carried = [_carried(cri, pod) for pod in (server, client)]
        assert all(min(each) > 0 for each in carried), carried
        assert client.ended(client.run("python3", "-c", FETCH, address))["exitCode"] == 0
        for pod, before in zip((server, client), carried, strict=True):
            assert all(after > each for after, each in zip(_carried(cri, pod), before, strict=True))
        shown = server.exec(listening, "cat", "/etc/hosts", "/etc/resolv.conf").ok().out
        assert "127.0.0.1" in shown
        assert "nameserver 192.0.2.53" in shown


def _carried(cri: Cri, pod: CriPod) -> tuple[int, int]:
    """Bytes that its first interface received and sent, which containerd asks the host's kernel for."""
    [stats] = cri.json("statsp", "--output=json", "--id", pod.id)["stats"]
    interface = stats["linux"]["network"]["defaultInterface"]
    assert interface["name"] == "eth0"
    return int(interface["rxBytes"]["value"]), int(interface["txBytes"]["value"])


@pytest.mark.client("crictl port-forward", "works", "where nobody listens, a connection is made and closed")
def test_a_port_of_the_pod_is_forwarded_to(cri: Cri, pod: CriPod) -> None:
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


@pytest.mark.client("crictl create (oom_score_adj)", "works", "of the VM on the host, too")
def test_a_machine_is_as_precious_as_the_pods_most_precious_container(cri: Cri, pod: CriPod) -> None:
    def score() -> str:
        return Path(f"/proc/{pod.state['qemu_pid']}/oom_score_adj").read_text().strip()

    def asking(score: int) -> str:
        return pod.run(*FOREVER, linux={**OWN_PIDS, "resources": {"oom_score_adj": score}})

    common = asking(900)
    assert score() == "900"
    assert pod.exec(common, "cat", "/proc/1/oom_score_adj").ok().out == "900\n"
    precious = asking(700)
    assert score() == "700"
    cri("rm", "--force", precious).ok()
    assert score() == "900"


@pytest.mark.client("crictl create (security context)", "works", "")
def test_what_a_security_context_asks_for_holds_in_the_guest(pod: CriPod) -> None:
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
    container = pod.run(*FOREVER, linux={"security_context": context})
    assert pod.exec(container, "id", "-u").ok().out == "1000\n"
    assert pod.exec(container, "id", "-G").ok().out == "1001 1002\n"
    status = pod.exec(container, "grep", "-E", "^(CapEff|CapBnd|NoNewPrivs|Seccomp):", "/proc/self/status")
    found = dict(line.split(":\t") for line in status.ok().out.splitlines())
    assert found == {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    assert "Read-only file system" in failure(pod.exec(container, "touch", "/new"))
    assert pod.exec(container, "cat", "/proc/meminfo").ok().out == ""
    mounts = pod.exec(container, "cat", "/proc/self/mountinfo").ok().out.splitlines()
    # The last one of a path is what is seen there (proc(5)): its fifth field, and its own options.
    options = {fields[4]: fields[5].split(",") for fields in map(str.split, mounts)}
    assert "ro" in options["/proc/sys"]
    assert "rw" in options["/proc"]
    assert pod.exec(container, "python3", "-c", FORBIDDEN).ok().out == "EPERM\n"


@pytest.mark.client("crictl create (privileged)", "differs", "in its own VM, without the host's devices")
def test_a_privileged_container_is_so_in_its_own_machine(cri: Cri) -> None:
    privileged = {"security_context": {**OWN_PIDS["security_context"], "privileged": True}}
    with cri.pod(linux=privileged) as pod:
        container = pod.run(*FOREVER, linux=privileged)
        pod.exec(container, "python3", "-c", MOUNT).ok()
        assert pod.exec(container, "python3", "-c", FORBIDDEN).ok().out == "allowed\n"
        pod.exec(container, "sh", "-c", "echo 1 > /proc/sys/vm/overcommit_memory").ok()
        assert "No such file" in failure(pod.exec(container, "ls", "/dev/kvm"))
        assert pod.exec(container, *BOOT_ID).ok().out != Path("/proc/sys/kernel/random/boot_id").read_text()
