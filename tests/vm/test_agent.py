"""What the agent promises to the shim, asked of a real guest without shim and containerd."""

import asyncio
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from images.image import GuestImage
from rpc.api import agent as api
from rpc.api.cgroups import Metrics
from rpc.api.types import Empty
from rpc.errors import (
    AlreadyExists,
    CasemateError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from tests.vm.agentvm import BOOT_S, CALL_S, AgentVM, process, spec

MIB = 1 << 20


# the machine


def test_hello_tells_what_the_guest_is_and_how_it_booted(vm: AgentVM) -> None:
    answer = vm.run(vm.hello())
    spans = sorted(answer.spans, key=lambda span: span.start_ns)
    assert answer.protocol == api.PROTOCOL
    assert answer.kernel_release
    assert answer.python.startswith("3.")
    assert spans[0].start_ns == 0
    assert {"kernel", "agent imports", "agent connect"} <= {span.name for span in spans}
    for earlier, later in pairwise(spans):
        assert earlier.start_ns <= earlier.end_ns <= later.start_ns + 1_000_000
    assert spans[-1].end_ns < answer.monotonic_ns
    assert 0 < answer.memory_used_bytes < answer.memory_total_bytes < 256 * MIB


def test_agent_stays_within_its_memory_budget(vm: AgentVM) -> None:
    assert vm.run(vm.hello()).rss_bytes < 24 * MIB


SWITCHES = "cat /proc/1/task/*/status | awk '/ctxt_switches/ { sum += $2 } END { print sum }'"
"""How often the agent's threads have had a processor (proc(5)), said from where its process is to be seen."""
IDLE = f"""\
for try in 1 2 3 4 5 6 7 8 9 10 11 12; do
    before=$({SWITCHES}); sleep 5; after=$({SWITCHES})
    [ $after = $before ] && echo idle && break
    echo $((after - before))
done
"""


def test_agent_wakes_for_nothing_while_nothing_happens(vm: AgentVM) -> None:
    """What it does first, about the container that looks, ends by itself; nothing tells of that."""

    async def scenario() -> tuple[bytes, list[int]]:
        await vm.create("watch", spec("sh", "-c", f"cat /proc/1/comm; {IDLE} sleep 1000", without="pid"))
        await vm.start("watch")
        seen = b""
        async for chunk in vm.chunks("watch"):
            seen += chunk
            if b"idle" in seen:
                break
        # What is counted is the agent's: it works for each of these.
        asked = process("sh", "-c", SWITCHES)
        counts = [int((await vm.exec_once("watch", f"e{number}", asked))[1]) for number in range(2)]
        await vm.finish("watch")
        return seen, counts

    seen, (first, second) = vm.run(scenario())
    comm, *_, last = seen.split()
    assert last == b"idle", seen
    assert comm.startswith(b"python"), seen
    assert second > first > 0


def test_another_protocol_is_refused_with_the_way_out(vm: AgentVM) -> None:
    with pytest.raises(InvalidArgument, match="casemate image build"):
        vm.run(vm.hello(protocol=99))


def test_hello_sets_clock_and_hostname(vm: AgentVM) -> None:
    async def scenario() -> tuple[bytes, float, float]:
        before = time.time()  # what the guest is told may be long on its way
        await vm.hello(realtime_ns=time.time_ns(), hostname="renamed")
        _, out, _ = await vm.once("clock", spec("sh", "-c", "hostname; date +%s", without="uts"))
        return out, before, time.time()

    what = vm.run(scenario())
    hostname, seconds = what[0].split()
    assert hostname == b"renamed"
    assert what[1] - 2 < int(seconds) < what[2] + 1


@pytest.mark.parametrize(("base", "hellos"), [("2015-03-01", 1), ("2040-03-01", 2)], ids=["late", "early"])
def test_hello_turns_a_clock_that_is_years_off(
    image: GuestImage, disk: Path, tmp_path: Path, base: str, hellos: int
) -> None:
    """The first one can have waited in the port: only a later one can prove that the guest is early."""

    async def scenario(machine: AgentVM) -> bytes:
        await machine.begin()
        for _ in range(hellos - 1):
            await machine.hello(realtime_ns=time.time_ns())
        return (await machine.once("date", spec("date", "+%Y")))[1]

    with AgentVM(image, disk, tmp_path, options=("-rtc", f"base={base}")) as machine:
        assert int(machine.run(scenario(machine))) == time.gmtime().tm_year


def test_sysctls_of_the_network_hold_for_the_pods_one(vm: AgentVM) -> None:
    """Docker and Kubernetes ask for them in every pod; crun sets none in a network that it has not made."""
    ports, pings = "net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range"
    listen = (
        "nc -l -p 80 -e true & "
        "until nc -w 9 127.0.0.1 80 </dev/null 2>/dev/null; do kill -0 $! || exit 7; done"
    )

    def asking(script: str, **sysctl: str) -> dict[str, Any]:
        what = spec("sh", "-c", script, without="network", user={"uid": 1000, "gid": 1000})
        what["linux"]["sysctl"] = sysctl
        return what

    async def scenario() -> tuple[Any, Any, Any]:
        before = await vm.once("plain", asking(listen))
        with pytest.raises(InvalidArgument, match=f"sysctl {ports}: the kernel does not take 'many'"):
            await vm.once("wrong", asking("true", **{pings: "0 7", ports: "many"}))
        after = await vm.once("asks", asking(listen, **{ports: "0", "kernel.domainname": "x"}))
        value = await vm.once("value", asking("cat /proc/sys/net/ipv4/ping_group_range"))
        return before, after, value

    before, after, value = vm.run(scenario())
    assert before[0] == 7
    assert b"Permission denied" in before[2]
    assert after[0] == 0, after
    assert value[1].split() == [b"1", b"0"], "a container that was not made changed nothing"


def test_sync_answers(vm: AgentVM) -> None:
    assert vm.run(vm.client.call(api.SYNC, Empty(), timeout_s=30)) == Empty()


def test_a_share_that_cannot_be_mounted_is_an_error(vm: AgentVM) -> None:
    request = api.MountShareRequest(tag="nosuch", path="/run/casemate/other", fstype="virtiofs")
    with pytest.raises(Unavailable, match="no virtiofs device nosuch appeared within"):
        vm.run(vm.client.call(api.MOUNT_SHARE, request))
    for fstype, why in (
        ("erofs", "cannot mount erofs /dev/nosuch on /run/casemate/other"),
        ("xfs", "no xfs"),
    ):
        request = api.MountShareRequest(tag="/dev/nosuch", path="/run/casemate/other", fstype=fstype)
        with pytest.raises(FailedPrecondition, match=why):
            vm.run(vm.client.call(api.MOUNT_SHARE, request))
    request = api.MountShareRequest(tag="nosuch", path="/run/casemate/other", fstype="9p")
    with pytest.raises(FailedPrecondition, match=r"files come over vsock alone|kernel has no 9p"):
        vm.run(vm.client.call(api.MOUNT_SHARE, request))


# exit codes and signals


@pytest.mark.parametrize("code", [0, 1, 42, 127, 255])
def test_exit_code(vm: AgentVM, code: int) -> None:
    assert vm.run(vm.once("code", spec("sh", "-c", f"exit {code}")))[0] == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGUSR1, 34])
def test_signal_that_ends_a_process_shows_in_its_status(vm: AgentVM, number: int) -> None:
    async def scenario() -> int:
        await vm.exec("signalled", "victim", process("sleep", "1000"))
        await vm.signal("signalled", number, "victim")
        status = await vm.exit_of("signalled", "victim")
        await vm.delete("signalled", "victim")
        return status

    with vm.sleeper("signalled"):
        assert vm.run(scenario()) == 128 + number


def test_signal_reaches_the_handler_of_init(vm: AgentVM) -> None:
    async def scenario() -> tuple[bytes, int]:
        script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
        await vm.create("handler", spec("sh", "-c", script))
        await vm.start("handler")
        output = b""
        async for chunk in vm.chunks("handler"):
            output += chunk
            if output == b"ready\n":
                await vm.signal("handler", signal.SIGTERM)
        status = await vm.exit_of("handler")
        await vm.delete("handler")
        return output, status

    assert vm.run(scenario()) == (b"ready\ncaught\n", 5)


def test_signal_to_all_reaches_every_process(vm: AgentVM) -> None:
    async def scenario() -> list[int]:
        for name in ("one", "two"):
            await vm.exec("all", name, process("sleep", "1000"))
        await vm.signal("all", signal.SIGKILL, everyone=True)
        return [await vm.exit_of("all", name) for name in ("one", "two", "")]

    with vm.sleeper("all"):
        assert vm.run(scenario()) == [137, 137, 137]


def test_signal_after_the_end_is_not_found(vm: AgentVM) -> None:
    async def scenario() -> None:
        await vm.create("ended", spec("true"))
        await vm.start("ended")
        await vm.exit_of("ended")
        try:
            with pytest.raises(NotFound, match="exited already"):
                await vm.signal("ended", 15)
        finally:
            await vm.delete("ended")

    vm.run(scenario())


def test_signal_that_does_not_exist_is_invalid(vm: AgentVM) -> None:
    with vm.sleeper("odd"), pytest.raises(InvalidArgument, match="no signal 99"):
        vm.run(vm.signal("odd", 99))


def test_broken_pipes_end_processes_as_they_should(vm: AgentVM) -> None:
    """Python ignores SIGPIPE; what it starts must not."""
    assert vm.run(vm.once("pipe", spec("sh", "-c", "sh -c 'kill -PIPE $$; echo alive'; exit $?")))[:2] == (
        141,
        b"",
    )


def test_container_that_sees_the_agent_cannot_interrupt_it(vm: AgentVM) -> None:
    script = "for signal in INT TERM HUP QUIT USR1 PIPE CHLD KILL; do kill -$signal 1; done; sleep 0.2"
    assert vm.run(vm.once("rude", spec("sh", "-c", script, without="pid")))[0] == 0
    assert vm.run(vm.hello()).protocol == api.PROTOCOL


# what can go wrong with a command

WRONG = [
    (["nosuch"], {}, NotFound, 'exec: "nosuch": executable file not found in $PATH'),
    (["/bin/nosuch"], {}, NotFound, 'exec: "/bin/nosuch": stat /bin/nosuch: no such file or directory'),
    (["/etc/text"], {}, PermissionDenied, 'exec: "/etc/text": permission denied'),
    (["/etc"], {}, PermissionDenied, 'exec: "/etc": is a directory'),
    (["root-only"], {"user": {"uid": 7, "gid": 7}}, PermissionDenied, 'exec: "root-only": permission denied'),
    (["foreign"], {}, FailedPrecondition, "exec /bin/foreign: built for aarch64, this machine is x86_64"),
    (["garbage"], {}, FailedPrecondition, "exec /bin/garbage: exec format error"),
    (["lost-script"], {}, NotFound, "exec /bin/lost-script: its interpreter /bin/nosuch: no such file"),
    (["true"], {"cwd": "/etc/text"}, FailedPrecondition, 'cwd "/etc/text": not a directory'),
    ([], {}, InvalidArgument, "no arguments"),
]
IDS = ["missing", "absolute", "mode", "directory", "user", "machine", "format", "script", "cwd", "empty"]


@pytest.mark.parametrize(("args", "changes", "error", "words"), WRONG, ids=IDS)
def test_wrong_command_is_told_by_create_and_leaves_nothing(
    vm: AgentVM, args: list[str], changes: dict[str, Any], error: type[CasemateError], words: str
) -> None:
    with pytest.raises(error) as caught:
        vm.run(vm.create("wrong", spec(*args, **changes)))
    assert words in str(caught.value)
    with pytest.raises(NotFound, match="wrong does not exist"):
        vm.run(vm.start("wrong"))
    assert vm.run(vm.once("wrong", spec("true"))) == (0, b"", b"")
    assert "not cleaned up" not in vm.console.read_text()


@pytest.mark.parametrize(("args", "changes", "error", "words"), WRONG, ids=IDS)
def test_wrong_command_is_told_by_exec_and_leaves_nothing(
    vm: AgentVM, args: list[str], changes: dict[str, Any], error: type[CasemateError], words: str
) -> None:
    with vm.sleeper("host"):
        with pytest.raises(error) as caught:
            vm.run(vm.exec("host", "wrong", process(*args, **changes)))
        assert words in str(caught.value)
        assert vm.run(vm.exec_once("host", "wrong", process("true"))) == (0, b"")


def test_missing_working_directory_is_made_for_init_as_runc_does(vm: AgentVM) -> None:
    assert vm.run(vm.once("cwd", spec("pwd", cwd="/made/for/it"))) == (0, b"/made/for/it\n", b"")


def test_missing_working_directory_of_an_exec_is_not_found(vm: AgentVM) -> None:
    with vm.sleeper("host"), pytest.raises(NotFound, match='cwd "/not/there": no such file or directory'):
        vm.run(vm.exec("host", "lost", process("true", cwd="/not/there")))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{}", b'{"process": {}}'])
def test_specification_that_is_none_is_invalid(vm: AgentVM, text: bytes) -> None:
    with pytest.raises(InvalidArgument, match="OCI specification"):
        vm.run(
            vm.client.call(
                api.CREATE_CONTAINER, api.CreateContainerRequest(container_id="bad", spec_json=text)
            )
        )


@pytest.mark.parametrize("name", ["", "..", "a/b", "-x", "x" * 77])
def test_id_that_is_no_name_is_invalid(vm: AgentVM, name: str) -> None:
    with pytest.raises(InvalidArgument, match="no valid id"):
        vm.run(vm.create(name, spec("true")))


# the order of a life


def test_second_container_of_the_same_name_is_refused(vm: AgentVM) -> None:
    with vm.sleeper("twin"), pytest.raises(AlreadyExists, match="twin exists already"):
        vm.run(vm.create("twin", spec("true")))


def test_second_exec_of_the_same_name_is_refused(vm: AgentVM) -> None:
    async def scenario() -> None:
        await vm.exec("twins", "one", process("sleep", "1000"))
        with pytest.raises(AlreadyExists, match="exec one of container twins exists already"):
            await vm.exec("twins", "one", process("true"))

    with vm.sleeper("twins"):
        vm.run(scenario())


def test_what_does_not_exist_is_not_found(vm: AgentVM) -> None:
    for call in (
        vm.start("nobody"),
        vm.signal("nobody", 9),
        vm.delete("nobody"),
        vm.write("nobody", b""),
        vm.output("nobody"),
        vm.exec("nobody", "x", process("true")),
    ):
        with pytest.raises(NotFound, match="container nobody does not exist"):
            vm.run(call)
    with vm.sleeper("somebody"), pytest.raises(NotFound, match="exec nobody of container somebody"):
        vm.run(vm.signal("somebody", 9, "nobody"))


def test_moves_out_of_order_are_failed_preconditions(vm: AgentVM) -> None:
    async def scenario() -> None:
        with pytest.raises(FailedPrecondition, match="is running, it cannot be started"):
            await vm.start("order")
        with pytest.raises(FailedPrecondition, match="is running, it cannot be deleted"):
            await vm.delete("order")
        await vm.exec("order", "busy", process("sleep", "1000"))
        with pytest.raises(FailedPrecondition, match="is running, it cannot be deleted"):
            await vm.delete("order", "busy")
        await vm.signal("order", 9)
        await vm.exit_of("order")
        with pytest.raises(FailedPrecondition, match="stopped"):
            await vm.start("order")
        with pytest.raises(FailedPrecondition, match="stopped"):
            await vm.exec("order", "late", process("true"))

    with vm.sleeper("order"):
        vm.run(scenario())


def test_container_killed_before_its_start_exits(vm: AgentVM) -> None:
    async def scenario() -> int:
        await vm.create("unborn", spec("true"))
        await vm.signal("unborn", 9)
        status = await vm.exit_of("unborn")
        with pytest.raises(FailedPrecondition, match="stopped"):
            await vm.start("unborn")
        await vm.delete("unborn")
        return status

    assert vm.run(scenario()) == 137


@pytest.mark.parametrize("without", ["", "pid"], ids=["own pid namespace", "shared pid namespace"])
def test_execs_end_before_init(vm: AgentVM, without: str) -> None:
    async def scenario(name: str) -> None:
        for number in range(3):
            await vm.exec(name, f"e{number}", process("sleep", "1000"))
        vm.order.clear()
        await vm.signal(name, 9)
        await vm.exit_of(name)

    with vm.sleeper("family", without=without) as name:
        vm.run(scenario(name))
        assert vm.order[-1] == (name, "")
        assert sorted(vm.order[:-1]) == [(name, f"e{number}") for number in range(3)]


def test_many_execs_at_once(vm: AgentVM) -> None:
    async def one(number: int, turn: asyncio.Semaphore) -> None:
        async with turn:
            script = f"echo {number}; exit {number}"
            result = await vm.exec_once("many", f"n{number}", process("sh", "-c", script))
        assert result == (number, b"%d\n" % number)

    async def scenario() -> None:
        turn = asyncio.Semaphore(10)
        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(one(number, turn))

    with vm.sleeper("many"):
        vm.run(scenario())


def test_execs_while_the_container_dies_end_one_way_or_the_other(vm: AgentVM) -> None:
    async def one(name: str) -> None:
        try:
            await vm.exec("dying", name, process("sleep", "1000"))
        except CasemateError:
            return
        assert await vm.exit_of("dying", name) == 137

    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(one(f"n{number}"))
            await vm.signal("dying", 9)
        await vm.exit_of("dying")

    for _ in range(3):
        with vm.sleeper("dying"):
            vm.order.clear()
            vm.run(scenario())
            assert vm.order[-1] == ("dying", "")


def test_fifty_containers_one_after_the_other_leave_nothing(vm: AgentVM) -> None:
    async def scenario() -> tuple[int, int]:
        before = (await vm.hello()).rss_bytes
        for number in range(50):
            assert (await vm.once(f"c{number}", spec("true")))[0] == 0
        return before, (await vm.hello()).rss_bytes

    before, after = vm.run(scenario())
    assert after - before < MIB
    # The kernel's own are children of its process 2, and come and go.
    script = "cat /proc/[0-9]*/stat 2>/dev/null | sed 's/.*) //' | awk '$2 != 2' | wc -l"
    _, listing, _ = vm.run(vm.once("look", spec("sh", "-c", script, without="pid")))
    assert int(listing) < 20, "processes were left behind"


def test_orphans_are_reaped(vm: AgentVM) -> None:
    """In a shared pid namespace orphans become PID 1's: the agent's."""

    async def scenario() -> bytes:
        script = "for i in 1 2 3 4 5; do sh -c 'sleep 0.1 & exit'; done; sleep 1"
        assert (await vm.exec_once("orphans", "maker", process("sh", "-c", script)))[0] == 0
        # Others that end just now, as crun's do, are reaped in a moment.
        count = "grep -l '^State:.Z' /proc/[0-9]*/status | wc -l"
        until = (
            f"for i in $(seq 100); do left=$({count}); [ $left = 0 ] && break; sleep 0.1; done; echo $left"
        )
        return (await vm.exec_once("orphans", "count", process("sh", "-c", until)))[1]

    with vm.sleeper("orphans", without="pid"):
        assert int(vm.run(scenario())) == 0


def test_what_is_not_wanted_is_gone_whatever_its_state(vm: AgentVM) -> None:
    async def scenario() -> tuple[int, int]:
        for started in (False, True):
            await vm.create("unwanted", spec("sleep", "1000"))
            if started:
                await vm.start("unwanted")
                await vm.exec("unwanted", "e", process("sleep", "1000"))
                await vm.delete("unwanted", "e", kill=True)
            await vm.delete("unwanted", kill=True)
        return (await vm.once("unwanted", spec("sh", "-c", "exit 3")))[0], len(vm.exits)

    before = len(vm.exits)
    assert vm.run(scenario()) == (3, before), "an exit was told of what nobody wants"


# resources


def test_specification_of_the_kind_that_containerd_makes(vm: AgentVM) -> None:
    what = spec(
        *(
            "sh",
            "-c",
            "mkdir /no; mount | grep -c ' /sys'; : < /proc/kcore; ulimit -n; head -c 3 /dev/zero | wc -c",
        ),
        rlimits=[{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        oomScoreAdj=100,
    )
    what["mounts"] += [
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "size=65536k"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "nodev"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"]},
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
    ]
    what["linux"] |= {
        "cgroupsPath": "/default/some:systemd:name",
        "maskedPaths": ["/proc/kcore", "/proc/keys"],
        "readonlyPaths": ["/proc/sys"],
        "resources": {"devices": [{"allow": False, "access": "rwm"}], "cpu": {"shares": 1024}},
        "seccomp": {
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
        },
    }
    status, out, err = vm.run(vm.once("usual", what))
    assert status == 0
    assert out.split() == [b"2", b"1024", b"3"]
    assert err == b"mkdir: can't create directory '/no': Operation not permitted\n"


def test_oom_is_reported_before_the_exit_and_counted_until_delete(vm: AgentVM) -> None:
    async def scenario() -> Metrics:
        limit = {"memory": {"limit": 24 * MIB}}
        await vm.create("greedy", spec("sh", "-c", "head -c 200m /dev/zero | tail", resources=limit))
        await vm.start("greedy")
        await vm.oom_of("greedy")
        await vm.exit_of("greedy")
        return await _stats("greedy", vm)

    try:
        metrics = vm.run(scenario())
        assert metrics.memory_events is not None
        assert metrics.memory_events.oom_kill >= 1
        assert metrics.memory is not None
        assert metrics.memory.usage_limit == 24 * MIB
    finally:
        vm.run(vm.delete("greedy"))
    assert vm.ooms.count("greedy") == 1


def test_paused_container_stands_still(vm: AgentVM) -> None:
    async def scenario() -> None:
        await vm.create("still", spec("sh", "-c", "while :; do echo tick; sleep 0.05; done"))
        await vm.start("still")
        ticks = vm.chunks("still")
        await anext(ticks)
        await vm.client.call(api.PAUSE, api.ContainerRequest(container_id="still"))
        with pytest.raises(FailedPrecondition, match="paused"):
            await vm.exec("still", "x", process("true"))
        with pytest.raises(FailedPrecondition, match="is paused"):
            await vm.client.call(api.PAUSE, api.ContainerRequest(container_id="still"))
        rest = asyncio.ensure_future(_drain(ticks))
        _, still_reading = await asyncio.wait([rest], timeout=1.0)
        frozen = (await _stats("still", vm)).cpu
        await asyncio.sleep(0.5)  # that nothing happens has no event
        later = (await _stats("still", vm)).cpu
        assert still_reading
        assert frozen == later
        await vm.client.call(api.RESUME, api.ContainerRequest(container_id="still"))
        with pytest.raises(FailedPrecondition, match="not paused"):
            await vm.client.call(api.RESUME, api.ContainerRequest(container_id="still"))
        assert (await vm.exec_once("still", "x", process("true")))[0] == 0
        await vm.finish("still")
        await rest

    vm.run(scenario())


def test_paused_container_can_be_killed(vm: AgentVM) -> None:
    with vm.sleeper("ice"):
        vm.run(vm.client.call(api.PAUSE, api.ContainerRequest(container_id="ice")))
        vm.run(vm.signal("ice", 9))
        assert vm.run(vm.exit_of("ice")) == 137


def test_stats_are_the_cgroups_figures(vm: AgentVM) -> None:
    with vm.sleeper("figures", resources={"pids": {"limit": 33}, "memory": {"limit": 64 * MIB}}):
        metrics = vm.run(_stats("figures", vm))
    assert metrics.pids is not None
    assert (metrics.pids.current, metrics.pids.limit) == (1, 33)
    assert metrics.memory is not None
    assert 0 < metrics.memory.usage < metrics.memory.usage_limit == 64 * MIB
    assert metrics.memory.anon > 0
    assert metrics.cpu is not None
    assert metrics.cpu.usage_usec > 0


def test_update_changes_the_limits_of_a_running_container(vm: AgentVM) -> None:
    async def scenario() -> Metrics:
        resources = b'{"memory": {"limit": 50331648}, "pids": {"limit": 20}, "cpu": {"shares": 512}}'
        await vm.client.call(api.UPDATE, api.UpdateRequest(container_id="pliable", resources_json=resources))
        return await _stats("pliable", vm)

    with vm.sleeper("pliable"):
        metrics = vm.run(scenario())
    assert metrics.memory is not None
    assert metrics.memory.usage_limit == 48 * MIB
    assert metrics.pids is not None
    assert metrics.pids.limit == 20


def test_update_with_nonsense_is_an_error(vm: AgentVM) -> None:
    with vm.sleeper("stubborn"), pytest.raises(InvalidArgument, match="resources"):
        vm.run(
            vm.client.call(api.UPDATE, api.UpdateRequest(container_id="stubborn", resources_json=b"nonsense"))
        )


# the end of the machine


def test_shutdown_powers_off_by_itself(image: GuestImage, disk: Path, tmp_path: Path) -> None:
    async def scenario(machine: AgentVM) -> None:
        await machine.begin()
        await machine.create("running", spec("sleep", "1000"))
        await machine.start("running")
        await machine.client.call(api.SHUTDOWN, Empty(), timeout_s=CALL_S)
        await machine.client.closed()

    with AgentVM(image, disk, tmp_path) as machine:
        machine.run(scenario(machine))
        assert machine.qemu.wait(BOOT_S) == 0
        assert "panic" not in machine.console.read_text()


def test_guest_that_lost_its_shim_powers_off(image: GuestImage, disk: Path, tmp_path: Path) -> None:
    with AgentVM(image, disk, tmp_path) as machine:
        machine.run(machine.begin())
        machine.run(machine.client.close())
        assert machine.qemu.wait(BOOT_S) == 0


def test_agent_that_fails_says_why_on_the_console_and_ends_the_machine(
    image: GuestImage, disk: Path, tmp_path: Path
) -> None:
    with AgentVM(image, disk, tmp_path, cmdline="casemate.transport=pigeon") as machine:
        machine.qemu.wait(BOOT_S)
        console = machine.console.read_text()
    assert "casemate agent: PID 1 failed" in console
    assert "casemate.transport=pigeon is unknown" in console
    assert "Attempted to kill init" in console


def test_shim_that_comes_late_is_waited_for(image: GuestImage, disk: Path, tmp_path: Path) -> None:
    with AgentVM(image, disk, tmp_path, cmdline="casemate.transport=serial") as machine:
        with pytest.raises(subprocess.TimeoutExpired):
            machine.qemu.wait(8)
        assert machine.run(machine.begin()).protocol == api.PROTOCOL


async def _stats(name: str, vm: AgentVM) -> Metrics:
    answer = await vm.client.call(api.STATS, api.ContainerRequest(container_id=name), timeout_s=30)
    return Metrics.decode(answer.metrics)


async def _drain(chunks: object) -> None:
    try:
        async for _ in chunks:  # type: ignore[attr-defined]
            pass
    except Unavailable:
        return
