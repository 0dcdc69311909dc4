"""Containers as nerdctl asks for them, the client that containerd's own project makes for people."""

import json
import os
import stat
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.instance import RUNTIME, Instance
from tests.vm import census
from tests.vm.calling import RUN_S
from tests.vm.conftest import INSTANCE
from tests.vm.dockerlike import IMAGE, failure
from tests.vm.instances import Instances
from tests.vm.loops import LOOK, SIZE, WRITE, Loop
from tests.vm.nerdctl import Nerdctl
from tests.vm.pods import FORBIDDEN, FULL, MOUNT, TERMINAL_PROGRAM
from tests.vm.test_docker import ASKED, FOR_EVER, FOREVER, GUESTS_OWN, LIMITS, SETTINGS, TALK

DETACH = b"\x10\x11"  # ctrl-p ctrl-q


class NerdctlInstances(Instances):
    """Those whose containerd has had nerdctl's network, and what else stays when its first container went."""

    def settle(self, instance: Instance) -> None:
        nerdctl = Nerdctl(instance)
        nerdctl.prepare()
        nerdctl.run(IMAGE, "true").ok()


@pytest.fixture(scope="module")
def nerdctl_instances(demo_archive: Path, image_store: Path) -> Iterator[NerdctlInstances]:
    instances = NerdctlInstances(demo_archive, image_store)
    yield instances
    instances.close()


@pytest.fixture
def nerdctl(request: pytest.FixtureRequest, nerdctl_instances: NerdctlInstances) -> Iterator[Nerdctl]:
    """The client with a census before and after: whatever the test leaves behind fails it."""
    instance = nerdctl_instances.get(FULL)
    request.node.stash[INSTANCE] = instance
    nerdctl = Nerdctl(instance)
    before = census.take(nerdctl.ctr)
    yield nerdctl
    instance.clear_config()
    if left := census.left_after(nerdctl.ctr, before, but=nerdctl.is_own):
        nerdctl_instances.discard(instance)
        pytest.fail("left behind:\n" + "\n".join(left))


@pytest.mark.client("nerdctl run --runtime io.containerd.casemate.v2", "works", "in a VM of its own")
@pytest.mark.client(
    "nerdctl run --rm, -i", "works", "input, output, errors and exit status are the program's"
)
def test_a_container_is_a_machine_with_the_programs_output_and_status(nerdctl: Nerdctl) -> None:
    program = "cat; echo out; echo err >&2; cat /proc/sys/kernel/random/boot_id; exit 7"
    with nerdctl.start("run", "--rm", "-i", "--runtime", RUNTIME, IMAGE, "sh", "-c", program) as running:
        running.write(b"in\n")
        running.read_until(b"in\n", RUN_S)  # nerdctl loses an end of input before that, with runc, too
        done = running.finish(RUN_S)
    *words, boot = done.out.split()
    assert (done.code, words) == (7, ["out"])
    assert "err\n" in done.err
    assert boot != Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.client("nerdctl run -it", "works", "a terminal, its size at once and when it changes")
@pytest.mark.client("nerdctl run -it --detach-keys, attach", "works", "")
def test_a_terminal(nerdctl: Nerdctl) -> None:
    command = ("run", "-it", "--name", "terminal", *nerdctl.runtime, IMAGE, "python3", "-c", TERMINAL_PROGRAM)
    try:
        with nerdctl.terminal(*command, columns=101, rows=33) as terminal:
            terminal.expect(rb"isatty True True True", RUN_S)
            terminal.expect(rb"size=101x33", 20)
            terminal.resize_until(90, 20, rb"size=90x20", 30)
            terminal.write(b"hello\n")
            terminal.expect(rb"echo=hello", 20)
            terminal.write(DETACH)
            assert terminal.finish(20)[0] == 0
        with nerdctl.terminal("attach", "terminal") as terminal:
            terminal.write(b"again\n")
            terminal.expect(rb"echo=again", 20)
            terminal.write(b"quit\n")
            code, said = terminal.finish(20)
            assert code == 7, said
    finally:
        nerdctl("rm", "--force", "terminal").ok()


@pytest.mark.client(
    "nerdctl run --env, --env-file, --workdir, --user, --group-add, --hostname, --entrypoint", "works", ""
)
@pytest.mark.client("nerdctl run --read-only, --tmpfs, --mount type=tmpfs, --shm-size", "works", "")
@pytest.mark.client("nerdctl run --cap-drop, --cap-add, --ulimit, --sysctl, --init", "works", "")
@pytest.mark.client("nerdctl run --add-host, --dns", "works", "")
@pytest.mark.client("nerdctl run --device /dev/net/tun, /dev/fuse", "works", "the guest's own")
@pytest.mark.client(
    "nerdctl run --memory, --cpus, --pids-limit", "works", "as large as they say, in the guest"
)
def test_what_a_run_asks_for_holds_in_the_guest(nerdctl: Nerdctl, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("GIVEN=by the user\n")
    options = (
        *("--env-file", str(tmp_path / "env"), "--workdir", "/usr", "--user", "1000:1001"),
        *("--group-add", "1002", "--hostname", "some-host", "--read-only", "--tmpfs", "/given:mode=777"),
        *("--shm-size", "3m", "--mount", "type=tmpfs,destination=/more,tmpfs-size=1m", "--cap-drop", "ALL"),
        *("--cap-add", "NET_RAW"),
        *("--init", "--init-binary", nerdctl.tini, "--ulimit", "nofile=100:200"),
        *("--sysctl", "net.core.somaxconn=77", "--add-host", "nowhere:10.1.2.3", "--dns", "10.3.2.1"),
        *("--memory", "96m", "--cpus", "0.5", "--pids-limit", "50"),
        *("--device", "/dev/net/tun", "--device", "/dev/fuse", "--entrypoint", "python3"),
    )
    seen = json.loads(nerdctl.run(*options, IMAGE, "-c", SETTINGS).ok().out)
    assert seen == ASKED | {"parent": "tini-static"}


@pytest.mark.client("nerdctl run --volume, --mount type=bind", "works", "a directory both ways, a file, ro")
@pytest.mark.client("nerdctl run --volume NAME:PATH", "works", "filled with what the image has there")
@pytest.mark.client(
    "nerdctl run --device (a block device)", "works", "a disk of the VM, under the path that is asked for"
)
def test_volumes(nerdctl: Nerdctl, tmp_path: Path, loop: Loop) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "from-host").write_text("hello")
    program = (
        "cat /here/from-host /file; echo made >/here/from-guest; "
        'python3 -c "$0" /dev/given; python3 -c "$1" /dev/given; '
        "echo no >/file; grep -c alias /etc/skel/.bashrc && echo kept >/etc/skel/kept"
    )
    options = (
        *("--volume", f"{tmp_path}:/here"),
        *("--mount", f"type=bind,source={tmp_path}/from-host,target=/file,readonly"),
        *("--volume", "named:/etc/skel", "--device", f"{loop.path}:/dev/given"),
    )
    try:
        done = nerdctl.run(*options, IMAGE, "sh", "-c", program, LOOK, WRITE)
        assert "Read-only file system" in done.err
        assert done.out.startswith(f"hellohelloTrue {SIZE} host's\n")
        assert loop.file.read_bytes()[4096:4102] == b"guest!"
        assert done.code == 0, "the volume is empty"
        assert (tmp_path / "from-guest").read_text() == "made\n"
        assert nerdctl.run("-v", "named:/n:ro", IMAGE, "cat", "/n/kept").ok().out == "kept\n"
    finally:
        nerdctl("volume", "rm", "named").ok()


@pytest.mark.client("nerdctl run --detach, ps, inspect, rename, port", "works", "")
@pytest.mark.client("nerdctl run --publish", "works", "from the host, by CNI's portmap")
@pytest.mark.client("nerdctl exec, exec -it, exec --user --env --workdir", "works", "")
@pytest.mark.client("nerdctl top", "differs", "the one process that stands for the container on the host")
@pytest.mark.client(
    "nerdctl stats", "works", "CPU, memory, processes of its cgroup in the guest; its network"
)
@pytest.mark.client("nerdctl run --health-cmd, container healthcheck", "works", "")
@pytest.mark.client("nerdctl pause, unpause", "works", "")
@pytest.mark.client("nerdctl update --memory, --cpu-quota", "works", "in the guest, while it runs")
@pytest.mark.client(
    "nerdctl update --cpus", "differs", "nothing changes, with runc neither: nerdctl 2.2 sends no quota"
)
def test_a_container_that_runs(nerdctl: Nerdctl) -> None:
    options = ("--memory", "128m", "--publish", "127.0.0.1:8080:8000", "--health-cmd", "test -e /etc/passwd")
    with nerdctl.detached("python3", "-c", FOR_EVER, "0.0.0.0", options=options) as first:
        name = f"{first}-renamed"
        nerdctl("rename", first, name).ok()
        try:
            nerdctl.wait_said(name, "serving")
            about = nerdctl.inspect(name)
            assert about["State"]["Status"] == "running"
            assert name in nerdctl.out("ps", "--format", "{{.Names}}").split()
            assert nerdctl.out("port", name) == "8000/tcp -> 127.0.0.1:8080"
            assert nerdctl.beside(TALK, "127.0.0.1", "8080", "300000").startswith("300000 from ")

            program = "id -u; echo $GIVEN; pwd; exit 5"
            done = nerdctl("exec", "-u", "7", "-e", "GIVEN=x", "-w", "/usr", name, "sh", "-c", program)
            assert done.out == "7\nx\n/usr\n"
            assert "exit code 5" in failure(done)
            with nerdctl.terminal("exec", "-it", name, "python3", "-c", TERMINAL_PROGRAM) as terminal:
                terminal.expect(rb"isatty True True True", 60)
                terminal.write(b"quit\n")
                terminal.finish(20)

            (process,) = nerdctl.out("top", name).splitlines()[1:]
            assert process.split()[1] == str(about["State"]["Pid"])
            shown = nerdctl.json("stats", "--no-stream", "--format", "{{json .}}", name)
            assert shown["MemUsage"].endswith(" / 128MiB")
            assert int(shown["PIDs"]) >= 1
            assert float(shown["NetIO"].split("kB")[0]) > 300

            nerdctl("container", "healthcheck", name).ok()
            assert nerdctl.inspect(name)["State"]["Health"]["Status"] == "healthy"
            nerdctl("pause", name).ok()
            assert nerdctl.inspect(name)["State"]["Status"] == "paused"
            nerdctl("unpause", name).ok()
            nerdctl("update", "--memory", "200m", "--memory-swap", "300m", name).ok()
            for option, value in (("--cpu-quota", "50000"), ("--cpus", "0.25")):
                nerdctl("update", option, value, name).ok()
            assert nerdctl.exec(name, *LIMITS) == f"{200 << 20}\n50000 100000\n"
        finally:
            nerdctl("rename", name, first).ok()


@pytest.mark.client("nerdctl cp", "works", "both ways, while it runs and when it has ended")
@pytest.mark.client("nerdctl diff, commit", "works", "")
@pytest.mark.client("nerdctl stop, start, restart, kill --signal, wait, rm", "works", "")
def test_files_go_in_and_out_and_a_container_is_started_again(nerdctl: Nerdctl, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from the host\n")
    with nerdctl.detached(*FOREVER, options=("--network", "none")) as name:
        nerdctl.wait_said(name, "up")  # the trap is set
        nerdctl("cp", str(tmp_path / "in"), f"{name}:/srv/in").ok()
        assert nerdctl.exec(name, "cat", "/srv/in") == "from the host\n"
        nerdctl.exec(name, "sh", "-c", "echo from the guest >/srv/out")
        nerdctl("cp", f"{name}:/srv/out", str(tmp_path / "out")).ok()
        assert (tmp_path / "out").read_text() == "from the guest\n"
        assert {"A /srv/in", "A /srv/out"} <= set(nerdctl.out("diff", name).splitlines())

        nerdctl("stop", name).ok()
        assert nerdctl.inspect(name)["State"]["ExitCode"] == 3
        nerdctl.wait(lambda: nerdctl.out("logs", name) == "up\ntold", "its last words are in the log")
        nerdctl("cp", f"{name}:/srv/out", str(tmp_path / "again")).ok()
        assert (tmp_path / "again").read_text() == "from the guest\n"
        nerdctl("commit", name, "committed").ok()
        try:
            options = ("--network", "none", "--pull", "never")
            assert nerdctl.run(*options, "committed", "cat", "/srv/out").ok().out == "from the guest\n"
        finally:
            nerdctl("rmi", "committed").ok()

        nerdctl("start", name).ok()
        assert nerdctl.exec(name, "cat", "/srv/out") == "from the guest\n"
        nerdctl("restart", "--time", "0", name).ok()
        nerdctl.wait(lambda: nerdctl.out("logs", name).count("up") == 3, "its trap is set")
        nerdctl("kill", "--signal", "TERM", name).ok()
        assert nerdctl.out("wait", name) == "3"


MUCH = """\
import os, sys, time
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.1)
sys.stdout.write(("x" * 99 + chr(10)) * 50000)
print("so far", flush=True)
wait_for("/go")
print("more", flush=True)
wait_for("/end")
sys.stdout.write("END")
"""


@pytest.mark.client("nerdctl logs", "works", "to the last line")
@pytest.mark.client(
    "nerdctl logs --follow", "works", "while it runs: nerdctl itself may stop before its last line"
)
def test_a_log_has_the_last_line_of_much(nerdctl: Nerdctl) -> None:
    """nerdctl's logger reads until it hears of the exit; who follows the log stops then, wherever it is."""
    with nerdctl.detached("python3", "-c", MUCH, options=("--network", "none")) as name:
        nerdctl.wait(lambda: nerdctl.out("logs", "--tail", "1", name) == "so far", "it is in the log")
        with nerdctl.start("logs", "--follow", name) as log:
            assert len(log.read_until(b"so far\n", 60)) == 50000 * 100 + 7
            nerdctl.exec(name, "touch", "/go")
            assert log.read_until(b"more\n", 60) == b"more\n"
        nerdctl.exec(name, "touch", "/end")
        assert nerdctl.out("wait", name) == "0"
        nerdctl.wait(lambda: nerdctl.out("logs", "--tail", "1", name) == "END", "it is in the log")
        assert len(nerdctl.out("logs", name)) == 50000 * 100 + 7 + 5 + 3


@pytest.mark.client("nerdctl run --restart", "works", "in a new VM each time, by containerd")
def test_a_container_that_fails_is_run_again(nerdctl: Nerdctl) -> None:
    script = "echo try >>/tries; [ $(wc -l </tries) = 2 ] && echo goes on && exec sleep 1000; exit 1"
    options = ("--restart", "on-failure:3", "--network", "none")
    with nerdctl.detached("sh", "-c", script, options=options) as name:
        # containerd looks for what has ended every ten seconds.
        nerdctl.wait(lambda: nerdctl.out("logs", name) == "goes on", "it is run once more", RUN_S)
        assert nerdctl.exec(name, "cat", "/tries") == "try\ntry\n"


@pytest.mark.client("nerdctl run --network NAME (two of them), --ip, --mac-address", "works", "")
@pytest.mark.client("nerdctl run --network bridge (the default)", "works", "the guest has the address")
@pytest.mark.client("nerdctl run --network none", "works", "only loopback")
def test_networks(nerdctl: Nerdctl) -> None:
    macs = "cat /sys/class/net/eth0/address /sys/class/net/eth1/address"
    for number in (1, 2):
        nerdctl("network", "create", "--subnet", f"10.77.{number}.0/24", f"net{number}").ok()
    try:
        fixed = ("--network", "net1", "--ip", "10.77.1.9", "--hostname", "serves")
        with nerdctl.detached("python3", "-c", FOR_EVER, "0.0.0.0", options=fixed) as server:
            nerdctl.wait_said(server, "serving")
            assert nerdctl.beside(TALK, "10.77.1.9", "8000", "1000").startswith("1000 from 10.77.1.1")
            two = ("--network", "net1", "--network", "net2", "--mac-address", "02:00:00:00:00:77")
            command = ("sh", "-c", f'python3 -c "$0" {server} 8000 3000; {macs}', TALK)
            *sent, first, second = nerdctl.run(*two, IMAGE, *command).ok().out.split()
        assert " ".join(sent).startswith("3000 from 10.77.1.")
        assert {first, second} == {"02:00:00:00:00:77"}
    finally:
        nerdctl("network", "rm", "net1", "net2").ok()
    assert nerdctl.run("--network", "none", IMAGE, "ls", "/sys/class/net").ok().out.split() == ["lo"]


@pytest.mark.client("nerdctl run --network, --pid container:X", "works", "in the VM of X, with which it ends")
def test_a_container_in_the_network_of_another_is_in_its_machine(nerdctl: Nerdctl) -> None:
    boot = "cat /proc/sys/kernel/random/boot_id"
    with nerdctl.detached("python3", "-c", FOR_EVER, "127.0.0.1") as server:
        nerdctl.wait_said(server, "serving")
        joins = (f"--network=container:{server}", f"--pid=container:{server}")
        command = ("sh", "-c", f'{boot}; python3 -c "$0" 127.0.0.1 8000 5; cat /proc/1/cmdline', TALK)
        seen = nerdctl.run(*joins, IMAGE, *command).ok().out
        assert seen.split("\n")[:2] == [nerdctl.exec(server, *boot.split()).strip(), "5 from 127.0.0.1"]
        assert "serving" in seen, "its processes are not the other's"
        # It ends with the one whose machine it is in.
        with nerdctl.detached("sleep", "1000", options=joins[:1]) as joined:
            nerdctl("rm", "--force", server).ok()
            nerdctl.wait(lambda: joined not in nerdctl.out("ps", "--format", "{{.Names}}"), "it has ended")


@pytest.mark.client(
    "nerdctl compose up, ps, logs, exec, down", "works", "two services find each other by name"
)
def test_services_that_talk_to_each_other(nerdctl: Nerdctl, tmp_path: Path) -> None:
    service = f"{{image: {IMAGE}, runtime: {RUNTIME}, command: [python3, -c"
    composed = textwrap.dedent(f"""\
        services:
          web: {service}, {json.dumps(FOR_EVER)}, 0.0.0.0], volumes: ["data:/data"]}}
        volumes: {{data: {{}}}}
        """)
    (tmp_path / "compose.yaml").write_text(composed)
    asking = composed.replace(
        "volumes: {data",
        f"  asks: {service}, {json.dumps(TALK)}, web, '8000', '5'], depends_on: [web]}}\nvolumes: {{data",
    )
    compose = ("compose", "--file", str(tmp_path / "compose.yaml"), "--project-name", "composed")
    try:
        nerdctl(*compose, "up", "--detach", timeout_s=2 * RUN_S).ok()
        nerdctl.wait_said("composed-web-1", "serving")
        (tmp_path / "compose.yaml").write_text(asking)
        nerdctl(*compose, "up", "--detach", "asks", timeout_s=2 * RUN_S).ok()
        assert nerdctl.out("wait", "composed-asks-1") == "0"
        nerdctl.wait(lambda: "5 from 10." in nerdctl.out("logs", "composed-asks-1"), "it is in the log")
        assert "running" in nerdctl.out(*compose, "ps", "web")
        assert nerdctl.out(*compose, "exec", "-T", "web", "ls", "-d", "/data") == "/data"
    finally:
        nerdctl(*compose, "down", "--volumes", timeout_s=2 * RUN_S).ok()


@pytest.mark.client("nerdctl run --privileged", "differs", "in its own VM, without the host's devices")
@pytest.mark.client(
    "nerdctl run --memory (exceeded)", "works", "killed in the guest; inspect never says OOMKilled"
)
def test_a_privileged_container_is_so_in_its_own_machine(nerdctl: Nerdctl) -> None:
    program = 'python3 -c "$1" && python3 -c "$2" && echo 1 >/proc/sys/vm/overcommit_memory && ls /dev'
    options = ("--privileged", "--network", "none")
    command = ("sh", "-c", program, "sh", MOUNT, FORBIDDEN)
    allowed, *devices = nerdctl.run(*options, IMAGE, *command).ok().out.split()
    assert allowed == "allowed"
    assert "null" in devices
    assert set(devices) <= GUESTS_OWN
    small = ("--memory", "48m", "--memory-swap", "48m", "--network", "none")
    look = "grep -w oom_kill /sys/fs/cgroup/memory.events"
    program = f'python3 -c "bytearray(200 << 20)"; code=$?; {look}; exit $code'
    done = nerdctl.run(*small, IMAGE, "sh", "-c", program)
    assert (done.code, done.out) == (137, "oom_kill 1\n")


@pytest.mark.client("nerdctl run --network=host", "refused", "host network: not possible in a VM")
@pytest.mark.client("nerdctl run --pid=host, --ipc=host, --uts=host", "refused", "host ... namespace")
@pytest.mark.client("nerdctl run --device (a character device)", "refused", "its driver is the host's")
@pytest.mark.client("nerdctl run --device-read-bps", "refused", "its device is the host's")
@pytest.mark.client("nerdctl run --volume (of a socket)", "refused", "its other end is on the host")
@pytest.mark.client(
    "nerdctl run --gpus", "refused", "the driver that it gives is the host's; CDI's --device is the way"
)
def test_what_a_machine_cannot_have_is_refused_with_a_reason(nerdctl: Nerdctl) -> None:
    serial = nerdctl.instance.work / "serial"
    os.mknod(serial, stat.S_IFCHR | 0o600, os.makedev(4, 64))
    called = nerdctl.instance.work / "called"
    cli = nerdctl.instance.base / "bin" / "nvidia-container-cli"
    cli.write_text(f"#!/bin/sh\necho $* >>{called}\n")
    cli.chmod(0o755)
    refused: dict[str, tuple[str, ...]] = {
        "--network=host": ("host network", "--network=host"),
        "--pid=host": ("host PID namespace", "--pid=host"),
        "--ipc=host": ("host IPC namespace", "--ipc=host"),
        "--uts=host": ("host UTS namespace", "--uts=host"),
        f"--device={serial}:/dev/ttyS0": ("device /dev/ttyS0", "not passed into the VM"),
        "--device-read-bps=/dev/zero:1mb": ("throttleReadBpsDevice", "not possible in a VM"),
        "--volume=/run/containerd/containerd.sock:/s": ("containerd.sock is a socket", "on the host"),
        "--gpus=all": ("createRuntime hook", "nvidia-container-cli", "--device nvidia.com/pgpu=0"),
    }
    try:
        for option, words in refused.items():
            network = () if option == "--network=host" else ("--network", "none")
            said = failure(nerdctl.run(*network, option, IMAGE, "true"))
            for word in words:
                assert word in said, option
            assert "Traceback" not in said
        assert not called.exists(), "a tool of the host's driver was let at the container's files"
    finally:
        cli.unlink()
        serial.unlink()
