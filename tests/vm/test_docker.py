"""Containers as Docker Engine asks for them, through its own daemon and client."""

import json
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.instance import RUNTIME
from tests.vm import census, dockerd, powercut
from tests.vm.calling import RUN_S
from tests.vm.conftest import INSTANCE
from tests.vm.cri import BOOT_ID
from tests.vm.dockerd import Docker
from tests.vm.dockerlike import IMAGE, failure
from tests.vm.instances import Instances
from tests.vm.loops import LOOK, SIZE, WRITE, Loop
from tests.vm.pods import FORBIDDEN, MOUNT, TERMINAL_PROGRAM
from tests.vm.test_network import UNTIL, UNTIL_NONE

SETTINGS = """\
import ctypes, errno, json, os, resource, stat
libc = ctypes.CDLL(None, use_errno=True)
def read(path):
    with open(path) as file:
        return file.read().strip()
def writes(path):
    try:
        open(path + "/x", "w").close()
        return True
    except OSError as error:
        return error.strerror
status = dict(line.split(":", 1) for line in read("/proc/self/status").splitlines())
print(json.dumps({
    "env": os.environ.get("GIVEN"),
    "cwd": os.getcwd(),
    "ids": [os.getuid(), os.getgid(), sorted(os.getgroups())],
    "hostname": os.uname().nodename,
    "root": writes("/srv"),
    "tmpfs": writes("/given"),
    "files": resource.getrlimit(resource.RLIMIT_NOFILE),
    "capabilities": status["CapBnd"].strip(),
    "seccomp": status["Seccomp"].strip(),
    # keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, 1), which anybody may without a filter
    "forbidden": libc.syscall(250, 0, -2, 1) > 0 or errno.errorcode[ctypes.get_errno()],
    "memory": read("/sys/fs/cgroup/memory.max"),
    "cpu": read("/sys/fs/cgroup/cpu.max"),
    "pids": read("/sys/fs/cgroup/pids.max"),
    "somaxconn": read("/proc/sys/net/core/somaxconn"),
    "shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "hosts": ["10.1.2.3", "nowhere"] in [line.split() for line in read("/etc/hosts").splitlines()],
    "nameserver": "nameserver 10.3.2.1" in read("/etc/resolv.conf"),
    "sized": os.statvfs("/more").f_blocks * os.statvfs("/more").f_frsize,
    "devices": [os.stat(path).st_rdev == os.makedev(10, minor) and stat.S_ISCHR(os.stat(path).st_mode)
                for path, minor in (("/dev/net/tun", 200), ("/dev/fuse", 229))],
    "parent": read(f"/proc/{os.getppid()}/comm") if os.getppid() else "",
}))
"""

ASKED: dict[str, object] = {
    "env": "by the user",
    "cwd": "/usr",
    "ids": [1000, 1001, [1001, 1002]],
    "hostname": "some-host",
    "root": "Read-only file system",
    "tmpfs": True,
    "files": [100, 200],
    "capabilities": "0000000000002000",  # CAP_NET_RAW
    "seccomp": "2",
    "forbidden": "EPERM",
    "memory": str(96 << 20),
    "cpu": "50000 100000",
    "pids": "50",
    "somaxconn": "77",
    "shm": 3 << 20,
    "hosts": True,
    "nameserver": True,
    "sized": 1 << 20,
    "devices": [True, True],
}
"""What SETTINGS says of a run that asks for all of it, but for `parent`."""


@pytest.fixture(scope="module")
def engine(instances: Instances, demo_archive: Path) -> Iterator[Docker]:
    """One dockerd for the module, beside a containerd of the session's."""
    docker = Docker(instances.get(dockerd.CONTAINERD))
    docker.serve()
    try:
        docker("load", "--quiet", "--input", str(demo_archive)).ok()
        # What daemons open once in their lives is open then.
        docker.run(IMAGE, "true").ok()
        yield docker
    finally:
        docker.stop()
        dockerd.forget_cgroups()


@pytest.fixture
def docker(request: pytest.FixtureRequest, engine: Docker) -> Iterator[Docker]:
    """The engine with a census before and after: whatever the test leaves behind fails it."""
    request.node.stash[INSTANCE] = engine.instance
    before = census.take(engine.ctr)
    yield engine
    engine.instance.clear_config()
    if left := census.left_after(engine.ctr, before, but=engine.is_own):
        pytest.fail("left behind:\n" + "\n".join(left))


@pytest.mark.client("docker run --runtime io.containerd.casemate.v2", "works", "in a VM of its own")
@pytest.mark.client("docker run --rm", "works", "output, errors and exit status are the program's")
@pytest.mark.client("docker run --interactive", "works", "its input, to the end")
def test_a_container_is_a_machine_with_the_programs_output_and_status(docker: Docker) -> None:
    script = "cat; echo out; echo err >&2; cat /proc/sys/kernel/random/boot_id; exit 7"
    with docker.start("run", "--rm", "-i", "--runtime", RUNTIME, IMAGE, "sh", "-c", script) as running:
        running.write(b"in\n")
        done = running.finish(RUN_S)
    *words, boot = done.out.split()
    assert (done.code, words, done.err) == (7, ["in", "out"], "err\n")
    assert boot != Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.client("docker run -it", "works", "a terminal, its size at once and when it changes")
def test_a_terminal(docker: Docker) -> None:
    command = ("run", "--rm", "-it", IMAGE, "python3", "-c", TERMINAL_PROGRAM)
    with docker.terminal(*command, columns=101, rows=33) as terminal:
        terminal.expect(rb"isatty True True True", RUN_S)
        terminal.expect(rb"size=101x33", 20)
        terminal.resize_until(90, 20, rb"size=90x20", 30)
        terminal.write(b"hello\n")
        terminal.expect(rb"echo=hello", 20)
        terminal.write(b"quit\n")
        assert terminal.finish(20)[0] == 7


@pytest.mark.client("docker run --env, --workdir, --user, --group-add, --hostname", "works", "")
@pytest.mark.client("docker run --read-only, --tmpfs, --mount type=tmpfs, --shm-size", "works", "")
@pytest.mark.client(
    "docker run --cap-drop, --cap-add, --ulimit, --sysctl, --init",
    "works",
    "with Docker's seccomp filter",
)
@pytest.mark.client("docker run --add-host, --dns", "works", "")
@pytest.mark.client("docker run --device /dev/net/tun, /dev/fuse", "works", "the guest's own")
@pytest.mark.client(
    "docker run --memory, --cpus, --pids-limit",
    "works",
    "the container's cgroup in the guest; the VM's size is its profile's",
)
def test_what_a_run_asks_for_holds_in_the_guest(docker: Docker) -> None:
    options = (
        *("--env", "GIVEN=by the user", "--workdir", "/usr", "--user", "1000:1001", "--group-add", "1002"),
        *("--hostname", "some-host", "--read-only", "--tmpfs", "/given:mode=777", "--shm-size", "3m"),
        *("--mount", "type=tmpfs,destination=/more,tmpfs-size=1m", "--init"),
        *("--cap-drop", "ALL", "--cap-add", "NET_RAW"),
        *("--ulimit", "nofile=100:200", "--sysctl", "net.core.somaxconn=77"),
        *("--add-host", "nowhere:10.1.2.3", "--dns", "10.3.2.1"),
        *("--memory", "96m", "--cpus", "0.5", "--pids-limit", "50", "--device", "/dev/net/tun"),
        *("--device", "/dev/fuse"),
    )
    seen = json.loads(docker.run(*options, IMAGE, "python3", "-c", SETTINGS).ok().out)
    assert seen == ASKED | {"parent": "docker-init"}


@pytest.mark.client("docker run --volume, --mount type=bind", "works", "a directory both ways, a file, ro")
@pytest.mark.client("docker run --volume NAME:PATH", "works", "filled with what the image has there")
@pytest.mark.client(
    "docker run --device (a block device)", "works", "a disk of the VM, under the path that is asked for"
)
def test_volumes(docker: Docker, loop: Loop) -> None:
    work = docker.instance.work / "docker-volume"
    work.mkdir()
    (work / "from-host").write_text("hello")
    script = (
        "cat /here/from-host /file; echo made >/here/from-guest; "
        'python3 -c "$0" /dev/given; python3 -c "$1" /dev/given; '
        "echo no >/file; grep -c alias /etc/skel/.bashrc && echo kept >/etc/skel/kept"
    )
    options = (
        *("--volume", f"{work}:/here", "--mount", f"type=bind,source={work}/from-host,target=/file,readonly"),
        *("--volume", "named:/etc/skel", "--device", f"{loop.path}:/dev/given"),
    )
    try:
        done = docker.run(*options, IMAGE, "sh", "-c", script, LOOK, WRITE)
        assert "Read-only file system" in done.err
        assert done.out.startswith(f"hellohelloTrue {SIZE} host's\n")
        assert loop.file.read_bytes()[4096:4102] == b"guest!"
        assert done.code == 0, "the volume is empty"
        assert (work / "from-guest").read_text() == "made\n"
        assert docker.run("-v", "named:/n:ro", IMAGE, "cat", "/n/kept").ok().out == "kept\n"
    finally:
        docker("volume", "rm", "named").ok()


FOR_EVER = """\
import socket, sys
with socket.create_server((sys.argv[1], 8000)) as server:
    print("serving", flush=True)
    while True:
        connection, peer = server.accept()
        with connection:
            data = 0
            while more := connection.recv(65536):
                data += len(more)
            connection.sendall(f"{data} from {peer[0]}".encode())
"""
TALK = """\
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=20) as connection:
    connection.sendall(bytes(int(sys.argv[3])))
    connection.shutdown(socket.SHUT_WR)
    print(connection.recv(1000).decode())
"""
NAMES = """\
import socket
with socket.socket(type=socket.SOCK_DGRAM) as server:
    server.bind(("10.86.0.1", 53))
    print("serving", flush=True)
    while True:
        question, peer = server.recvfrom(512)
        # An answer to the same question, whose name is at byte 12: an A record, for a second.
        head = question[:2] + bytes((0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0))
        body = question[12 : question.index(0, 12) + 5]
        server.sendto(head + body + bytes((0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 10, 9, 8, 7)), peer)
"""
"""A name server for which every name has one address."""
GUESTS_OWN = {
    *("console", "core", "fd", "full", "fuse", "mqueue", "net", "null", "ptmx", "pts", "random", "shm"),
    *("stderr", "stdin", "stdout", "tty", "urandom", "zero"),
}
"""What may be in a container's /dev that asked for nothing."""
LOOK_UP = "import socket, sys; print(*map(socket.gethostbyname, sys.argv[1:]))"
LIMITS = ("cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max")
FOREVER = ("sh", "-c", "trap 'echo told; exit 3' TERM; echo up; while :; do sleep 0.1; done")


@pytest.mark.client("docker run --detach, logs, ps, rename, inspect", "works", "")
@pytest.mark.client("docker exec, exec -it, exec --user --env --workdir", "works", "")
@pytest.mark.client("docker top", "differs", "the one process that stands for the container on the host")
@pytest.mark.client("docker stats", "works", "CPU, memory, processes of the container's cgroup in the guest")
@pytest.mark.client("docker run --health-cmd", "works", "")
@pytest.mark.client("docker pause, unpause", "works", "")
@pytest.mark.client("docker update --memory, --cpus", "works", "in the guest, while it runs")
def test_a_container_that_runs(docker: Docker) -> None:
    healthy = (
        "--health-cmd",
        "test -e /etc/passwd",
        "--health-start-interval",
        "1s",
        "--health-start-period",
        "99s",
    )
    with docker.detached(*FOREVER, options=("--memory", "128m", *healthy)) as first:
        name = f"{first}-renamed"
        docker("rename", first, name).ok()
        try:
            docker.wait_said(name, "up")
            about = docker.inspect(name)
            assert (about["State"]["Status"], about["HostConfig"]["Runtime"]) == ("running", RUNTIME)
            assert docker.out("ps", "--format", "{{.Names}}") == name

            script = "id -u; echo $GIVEN; pwd; exit 5"
            done = docker("exec", "-u", "7", "-e", "GIVEN=x", "-w", "/usr", name, "sh", "-c", script)
            assert (done.code, done.out) == (5, "7\nx\n/usr\n")
            with docker.terminal("exec", "-it", name, "python3", "-c", TERMINAL_PROGRAM) as terminal:
                terminal.expect(rb"isatty True True True", 60)
                terminal.write(b"quit\n")
                assert terminal.finish(20)[0] == 7

            titles, *processes = docker.out("top", name, "-o", "pid,comm").splitlines()
            assert [line.split()[0] for line in processes] == [str(about["State"]["Pid"])], titles
            shown = docker.json("stats", "--no-stream", "--format", "{{json .}}", name)
            assert shown["MemUsage"].endswith(" / 128MiB")
            assert int(shown["PIDs"]) >= 1
            assert float(shown["MemPerc"].rstrip("%")) > 0

            docker.wait(
                lambda: docker.inspect(name)["State"]["Health"]["Status"] == "healthy", "a check went well"
            )
            docker("pause", name).ok()
            assert docker.inspect(name)["State"]["Status"] == "paused"
            assert "paused" in failure(docker("exec", name, "true"))
            docker("unpause", name).ok()
            docker("update", "--memory", "200m", "--memory-swap", "300m", "--cpus", "0.5", name).ok()
            assert docker.exec(name, *LIMITS) == f"{200 << 20}\n50000 100000\n"
        finally:
            docker("rename", name, first).ok()


@pytest.mark.client("docker cp", "works", "both ways, while it runs and when it has ended")
@pytest.mark.client("docker diff, commit", "works", "")
@pytest.mark.client("docker stop, start, restart, kill --signal, attach, wait, rm", "works", "")
def test_files_go_in_and_out_and_a_container_is_started_again(docker: Docker, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host\n")
    with docker.detached(*FOREVER) as name:
        docker.wait_said(name, "up")  # the trap is set
        docker("cp", str(tmp_path / "in"), f"{name}:/srv/in").ok()
        assert docker.exec(name, "cat", "/srv/in") == "from the host\n"
        docker.exec(name, "sh", "-c", "echo from the guest >/srv/out")
        docker("cp", f"{name}:/srv/out", str(tmp_path / "out")).ok()
        assert (tmp_path / "out").read_text() == "from the guest\n"
        assert docker.out("diff", name).splitlines() == ["C /srv", "A /srv/in", "A /srv/out"]

        docker("stop", name).ok()
        assert docker.inspect(name)["State"]["ExitCode"] == 3
        assert docker.out("logs", name) == "up\ntold"
        docker("cp", f"{name}:/srv/out", str(tmp_path / "again")).ok()
        docker("commit", name, "committed").ok()
        try:
            assert docker.run("committed", "cat", "/srv/out").ok().out == "from the guest\n"
        finally:
            docker("rmi", "committed").ok()

        docker("start", name).ok()
        assert docker.exec(name, "cat", "/srv/out") == "from the guest\n"
        docker("restart", "--time", "0", name).ok()
        docker.wait(lambda: docker.out("logs", name).count("up") == 3, "its trap is set")
        since = f"{time.time():.9f}"
        with docker.start("attach", name) as attached:
            docker.wait(lambda: _was_told(docker, name, "attach", since), "it is attached")
            docker("kill", "--signal", "TERM", name).ok()
            done = attached.finish(20)
        assert (done.code, done.out) == (3, "told\n")
        assert docker.out("wait", name) == "3"


def _was_told(docker: Docker, name: str, event: str, since: str) -> bool:
    """Whether the daemon had such an event of the container's from then to now."""
    options = ("--since", since, "--until", f"{time.time():.9f}", "--filter", f"container={name}")
    return event in docker.out("events", *options, "--filter", f"event={event}")


@pytest.mark.client("docker run --restart", "works", "in a new VM each time")
def test_a_container_that_fails_is_run_again(docker: Docker) -> None:
    script = "echo try >>/tries; [ $(wc -l </tries) = 2 ] && echo goes on && exec sleep 1000; exit 1"
    with docker.detached("sh", "-c", script, options=("--restart", "on-failure:3")) as name:
        docker.wait(lambda: docker.inspect(name)["RestartCount"] == 1, "it is run once more")
        # `Running` is true, too, of one that Docker has yet to start again.
        docker.wait(lambda: docker.inspect(name)["State"]["Status"] == "running", "Docker knows it")
        docker.wait_said(name, "goes on")
        assert docker.exec(name, "cat", "/tries") == "try\ntry\n"


@pytest.mark.client("docker run --network bridge (the default)", "works", "the guest has the address")
@pytest.mark.client("docker stats (of networks)", "works", "what its interfaces on the host carried")
@pytest.mark.client("docker run --publish", "works", "by iptables and docker-proxy, from the host")
@pytest.mark.client("docker network connect, disconnect", "works", "an interface comes, and goes, as it runs")
def test_networks(docker: Docker) -> None:
    serving = ("python3", "-c", FOR_EVER, "0.0.0.0")
    options = ("--publish", "127.0.0.1:8080:8000", "--publish", "8081:8000")
    docker("network", "create", "later").ok()
    try:
        with docker.detached(*serving, options=options) as server:
            docker.wait_said(server, "serving")
            networks = docker.inspect(server)["NetworkSettings"]["Networks"]
            address = networks["bridge"]["IPAddress"]
            assert address in docker.exec(server, "ip", "address")
            for target, port in (("127.0.0.1", "8080"), ("127.0.0.1", "8081"), (address, "8000")):
                sent = docker.beside(TALK, target, port, "100000")
                assert sent.startswith("100000 from "), (target, port)
            # Another container reaches it over the bridge.
            sent = docker.run(IMAGE, "python3", "-c", TALK, address, "8000", "100000").ok().out
            assert sent.startswith("100000 from 172.")
            received = docker.out("stats", "--no-stream", "--format", "{{.NetIO}}", server)
            assert float(received.split("kB")[0]) > 400

            docker("network", "connect", "--alias", "renamed", "later", server).ok()
            there = docker.inspect(server)["NetworkSettings"]["Networks"]["later"]["IPAddress"]
            docker.exec(server, "bash", "-c", UNTIL.replace("$1", there + "/16"))
            assert docker.exec(server, "getent", "hosts", "renamed").split()[0] == there
            docker("network", "disconnect", "later", server).ok()
            docker.exec(server, "bash", "-c", UNTIL_NONE.replace("$1", "eth1"))
    finally:
        docker("network", "rm", "later").ok()


@pytest.mark.client(
    "docker run --network NAME, --network-alias, --dns (of a network of its own)",
    "works",
    "names of containers, and of others, by Docker's name server (IPv4)",
)
def test_names_of_containers_and_of_the_world(docker: Docker) -> None:
    docker("network", "create", "--subnet", "10.86.0.0/24", "named").ok()
    try:
        alias = ("--network", "named", "--network-alias", "web")
        with docker.detached("sleep", "1000", options=alias) as server, docker.serving(NAMES) as names:
            names.read_until(b"serving\n", 20)
            asked = (server, "web", "elsewhere.example")
            options = ("--network", "named", "--dns", "10.86.0.1")
            seen = docker.run(*options, IMAGE, "python3", "-c", LOOK_UP, *asked).ok().out.split()
        assert seen == ["10.86.0.2", "10.86.0.2", "10.9.8.7"]
    finally:
        docker("network", "rm", "named").ok()


@pytest.mark.client("docker run --network, --pid container:X", "works", "in the VM of X, with which it ends")
def test_a_container_in_the_network_of_another_is_in_its_machine(docker: Docker) -> None:
    boot = "cat /proc/sys/kernel/random/boot_id"
    with docker.detached("python3", "-c", FOR_EVER, "127.0.0.1") as server:
        docker.wait_said(server, "serving")
        joins = (f"--network=container:{server}", f"--pid=container:{server}")
        command = ("sh", "-c", f'{boot}; python3 -c "$0" 127.0.0.1 8000 5; cat /proc/1/cmdline', TALK)
        seen = docker.run(*joins, IMAGE, *command).ok().out
        assert seen.split("\n")[:2] == [docker.exec(server, *boot.split()).strip(), "5 from 127.0.0.1"]
        assert "serving" in seen, "its processes are not the other's"
        # It ends with the one whose machine it is in.
        with docker.detached("sleep", "1000", options=joins[:1]) as joined:
            docker("stop", "--time", "0", server).ok()
            assert docker.out("wait", joined) == "137"
            assert "running" in failure(docker("start", joined))


@pytest.mark.client("docker run --network none", "works", "only loopback")
def test_no_network(docker: Docker) -> None:
    shown = docker.run("--network", "none", IMAGE, "ls", "/sys/class/net").ok().out
    assert shown.split() == ["lo"]


@pytest.mark.client("docker run --privileged", "differs", "in its own VM, without the host's devices")
def test_a_privileged_container_is_so_in_its_own_machine(docker: Docker) -> None:
    script = 'python3 -c "$1" && python3 -c "$2" && echo 1 >/proc/sys/vm/overcommit_memory && ls /dev'
    command = ("sh", "-c", script, "sh", MOUNT, FORBIDDEN)
    allowed, *devices = docker.run("--privileged", IMAGE, *command).ok().out.split()
    assert allowed == "allowed"
    assert "null" in devices
    assert set(devices) <= GUESTS_OWN


@pytest.mark.client("docker run --memory (exceeded)", "works", "inspect says OOMKilled")
def test_a_container_beyond_its_memory_is_killed_and_said_to_have_been(docker: Docker) -> None:
    command = ("python3", "-c", "bytearray(200 << 20)")
    with docker.detached(*command, options=("--memory", "48m", "--memory-swap", "48m")) as name:
        assert docker.out("wait", name) == "137"
        assert docker.inspect(name)["State"]["OOMKilled"] is True


@pytest.mark.client("docker run --network=host", "refused", "host network: not possible in a VM")
@pytest.mark.client("docker run --pid=host, --ipc=host, --uts=host", "refused", "host ... namespace")
@pytest.mark.client("docker run --pid container:X alone", "refused", "two VMs share no namespace")
@pytest.mark.client("docker run --device (a character device)", "refused", "its driver is the host's")
@pytest.mark.client("docker run --volume (of a socket)", "refused", "its other end is on the host")
def test_what_a_machine_cannot_have_is_refused_with_a_reason(docker: Docker) -> None:
    serial = docker.instance.work / "serial"
    os.mknod(serial, stat.S_IFCHR | 0o600, os.makedev(4, 64))
    with docker.detached("sleep", "1000") as other:
        for options, words in (
            (("--network=host",), ("host network", "--network=host")),
            (("--pid=host",), ("host PID namespace", "--pid=host")),
            (("--ipc=host",), ("host IPC namespace", "--ipc=host")),
            (("--uts=host",), ("host UTS namespace", "--uts=host")),
            ((f"--pid=container:{other}",), ("pid namespace /proc/", "--network container:X")),
            ((f"--device={serial}:/dev/ttyS0",), ("device /dev/ttyS0", "not passed into the VM")),
            (("--volume=/run/docker.sock:/s",), ("/run/docker.sock is a socket", "on the host")),
        ):
            said = failure(docker.run(*options, IMAGE, "true"))
            for word in words:
                assert word in said, options
            assert "Traceback" not in said


@pytest.mark.client("docker (dockerd restarted)", "works", "containers end, and --restart=always begins anew")
@pytest.mark.client("docker (dockerd restarted or killed, live-restore)", "works", "containers go on")
def test_the_daemon_may_be_restarted(docker: Docker) -> None:
    script = "mkfifo /fifo; exec 3<>/fifo; echo up; while read line; do echo $line; done <&3"
    options = ("--restart", "always", "--init")
    try:
        with docker.detached("sh", "-c", script, options=options) as name:
            docker.wait_said(name, "up")
            docker.stop()
            docker.serve("--live-restore")
            docker.wait(lambda: docker.out("logs", name) == "up\nup", "it runs once more")
            pid = docker.inspect(name)["State"]["Pid"]
            for number in (signal.SIGTERM, signal.SIGKILL):
                docker.stop(number)
                docker.serve("--live-restore")
                assert docker.inspect(name)["State"]["Pid"] == pid
                docker.exec(name, "sh", "-c", f"echo {number.name} >/fifo")
                docker.wait_said(name, number.name)
    finally:
        docker.stop()
        docker.serve()


@pytest.mark.client("docker (after the host lost its power)", "works", "--restart=always begins anew")
def test_what_is_to_run_always_begins_anew_after_a_power_cut(docker: Docker) -> None:
    script = "cat /kept; echo kept >/kept; sync; echo up; exec sleep 1000"
    with (
        docker.detached("sh", "-c", script, options=("--restart", "always", "--publish", "8000")) as always,
        docker.detached("sleep", "1000") as once,
    ):
        docker.wait_said(always, "up")
        boot = docker.exec(always, *BOOT_ID)
        powercut.cut_power(docker.ctr)
        docker.pid = 0
        docker.instance.start()
        docker.serve()
        docker.wait(lambda: docker.out("logs", always).endswith("kept\nup"), "it runs once more")
        assert docker.exec(always, *BOOT_ID) != boot
        assert not docker.inspect(once)["State"]["Running"]
        docker("start", once).ok()
        docker.exec(once, "true")
