"""The agent's small parts: events, states, command line, modules, clock, mounts, spans, ids, files."""

import asyncio
import os
import struct
import time
from pathlib import Path

import pytest

from agent import boot, files, libc, system
from agent.containers import check_id, parse_object
from agent.events import EventQueue
from agent.process import Process
from agent.reaper import Exit
from agent.spans import Spans, early_spans
from agent.stdio import Stdio
from agent.transport import find_port
from rpc.api.agent import Event
from rpc.errors import CasemateError, FailedPrecondition, InvalidArgument, NotFound

# events


def test_event_stays_until_it_is_dropped() -> None:
    async def scenario() -> None:
        queue = EventQueue()
        queue.put(Event(container_id="a"))
        queue.put(Event(container_id="b"))
        assert (await queue.first()).container_id == "a"
        assert (await queue.first()).container_id == "a"
        queue.drop_first()
        assert (await queue.first()).container_id == "b"
        queue.drop_first()
        waiting = asyncio.create_task(queue.first())
        await asyncio.sleep(0)
        assert not waiting.done()
        queue.put(Event(container_id="c"))
        assert (await waiting).container_id == "c"

    asyncio.run(scenario())


def test_one_listener_at_a_time() -> None:
    queue = EventQueue()
    with queue.subscribe(), pytest.raises(FailedPrecondition, match="already"), queue.subscribe():
        pass
    with queue.subscribe():
        pass


# states


def make_process() -> Process:
    return Process("c", "e", Stdio())


def test_a_life_in_order() -> None:
    async def scenario() -> None:
        process = make_process()
        assert process.state.name == "being created"
        process.created(4194305, asyncio.get_running_loop().create_future())
        assert process.state.name == "created"
        process.started()
        assert process.state.name == "running"
        process.exited(Exit(1, 2))
        process.state.deleted(process.who)

    asyncio.run(scenario())


def test_illegal_moves_name_the_process_and_its_state() -> None:
    async def scenario() -> None:
        process = make_process()
        with pytest.raises(
            FailedPrecondition, match="exec e of container c is being created, it cannot be s"
        ):
            process.started()
        with pytest.raises(FailedPrecondition, match="being created, it cannot be signalled"):
            process.signal(15)
        process.created(4194305, asyncio.get_running_loop().create_future())
        with pytest.raises(FailedPrecondition, match="created, it cannot be deleted"):
            process.state.deleted(process.who)
        process.started()
        with pytest.raises(FailedPrecondition, match="running, it cannot be started"):
            process.started()
        with pytest.raises(FailedPrecondition, match="running, it cannot be deleted"):
            process.state.deleted(process.who)
        process.exited(Exit(0, 0))
        with pytest.raises(NotFound, match="exited already"):
            process.signal(15)

    asyncio.run(scenario())


def test_a_reaped_process_is_not_signalled_even_before_its_exit_is_told() -> None:
    """Its pid may be another process's by now."""

    async def scenario() -> None:
        process = make_process()
        ended = asyncio.get_running_loop().create_future()
        process.created(os.getpid(), ended)
        process.started()
        ended.set_result(Exit(0, 0))
        with pytest.raises(NotFound, match="exited already"):
            process.signal(9)

    asyncio.run(scenario())


@pytest.mark.parametrize("number", [0, -1, 65, 1000])
def test_signals_that_do_not_exist(number: int) -> None:
    with pytest.raises(InvalidArgument, match="no signal"):
        make_process().signal(number)


def test_process_without_input_says_so() -> None:
    with pytest.raises(FailedPrecondition, match="has no standard input"):
        make_process().stdin()


# boot


def test_command_line_settings(tmp_path: Path) -> None:
    path = tmp_path / "cmdline"
    path.write_text("console=ttyS0 casemate.transport=vsock casemate.port=77 casemate.flag quiet\n")
    assert boot.command_line(str(path)) == {"transport": "vsock", "port": "77"}


def test_features_of_the_image(tmp_path: Path) -> None:
    path = tmp_path / "modules.txt"
    path.write_text("virtiofs:\nbroken: /no/such/module.ko\n")
    boot.load_feature("virtiofs", str(path))
    with pytest.raises(FailedPrecondition, match="this guest image's kernel has no overlay"):
        boot.load_feature("overlay", str(path))
    with pytest.raises(FailedPrecondition, match=r"/no/such/module.ko cannot be loaded: No such file"):
        boot.load_feature("broken", str(path))


def test_nothing_is_mounted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything there already, mount_all() makes no system call: it would need privileges."""
    path = tmp_path / "mounts"
    targets = ("/proc", "/sys", "/dev", "/run", "/tmp", "/sys/fs/cgroup", "/dev/pts", "/dev/shm")
    path.write_text("".join(f"x {target} x rw 0 0\n" for target in targets))
    called: list[str] = []
    monkeypatch.setattr(libc, "mount", lambda source, target, *rest: called.append(target))
    boot.mount_all(str(path))
    assert called == []
    path.write_text("".join(f"x {target} x rw 0 0\n" for target in targets[1:]))
    boot.mount_all(str(path))
    assert called == ["/proc"]


# transport


def test_port_is_found_by_its_name(tmp_path: Path) -> None:
    assert find_port("wanted", str(tmp_path / "nosuch")) is None
    for port, name in (("vport1p1", "other"), ("vport2p1", None), ("vport2p3", "wanted")):
        (tmp_path / port).mkdir()
        if name:
            (tmp_path / port / "name").write_text(name + "\n")
    assert find_port("wanted", str(tmp_path)) == "/dev/vport2p3"
    assert find_port("unwanted", str(tmp_path)) is None


# the machine

SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("guest", "host", "only_forward", "off"),
    [
        (100 * SECOND, 100 * SECOND, False, False),
        (100 * SECOND, 100 * SECOND + 19_000_000, False, False),
        (100 * SECOND, 101 * SECOND, False, True),
        (100 * SECOND, 99 * SECOND, False, True),
        (100 * SECOND, 101 * SECOND, True, True),
        (100 * SECOND, 99 * SECOND, True, False),
    ],
)
def test_clock_is_set_when_it_matters(guest: int, host: int, only_forward: bool, off: bool) -> None:
    assert system.clock_is_off(guest, host, only_forward=only_forward) is off


@pytest.mark.parametrize(
    ("by_ns", "slewed", "stepped"),
    [(99_999_999, [99_999], []), (-7_000_000, [-7_000], []), (-SECOND, [], [100 * SECOND])],
)
def test_a_clock_is_set_back_only_by_much(
    by_ns: int, slewed: list[int], stepped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: tuple[list[int], list[int]] = [], []
    monkeypatch.setattr(libc, "adjtime", found[0].append)
    monkeypatch.setattr(time, "time_ns", lambda: 101 * SECOND)
    monkeypatch.setattr(time, "clock_settime_ns", lambda _, at_ns: found[1].append(at_ns))
    system.adjust_clock(by_ns)
    assert found == (slewed, stepped)


def test_mount_options_become_flags_and_data() -> None:
    flags, data = system.mount_arguments(["ro", "nodev", "dax=never", "rw", "x"])
    assert flags == libc.MS_RDONLY | libc.MS_NODEV
    assert data == "dax=never,x"


def test_memory_figures_are_plausible() -> None:
    total, used = system.memory_bytes()
    assert 0 < used < total
    assert 0 < system.rss_bytes() < total


# spans


def test_spans_follow_each_other() -> None:
    spans = Spans(0)
    spans.done("first")
    spans.done("second")
    (first, _, middle), (second, again, end) = spans.all()
    assert (first, second) == ("first", "second")
    assert middle == again <= end


def test_marks_of_the_initramfs_become_spans() -> None:
    fd = os.memfd_create("marks")
    os.write(fd, b"".join(struct.pack("qq", 1, n * 100) for n in (1, 2, 3)) + bytes(16))
    assert list(early_spans(2 * SECOND, str(fd))) == [
        ("kernel", 0, SECOND + 100),
        ("initramfs modules", SECOND + 100, SECOND + 200),
        ("initramfs mounts", SECOND + 200, SECOND + 300),
        ("python start", SECOND + 300, 2 * SECOND),
    ]
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_without_marks_all_is_the_kernels() -> None:
    assert list(early_spans(7, None)) == [("kernel", 0, 7)]


# ids and JSON


@pytest.mark.parametrize("name", ["a", "A.b-c_d", "0" * 76])
def test_good_ids(name: str) -> None:
    check_id(name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "-a", "_a", "a\n", "ä", "0" * 77])
def test_bad_ids(name: str) -> None:
    with pytest.raises(InvalidArgument, match="no valid id"):
        check_id(name)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]", b"1", b'"x"'])
def test_what_is_no_json_object(text: bytes) -> None:
    with pytest.raises(InvalidArgument, match="malformed thing"):
        parse_object(text, "thing")


def test_deep_json_is_an_error_like_any_other() -> None:
    with pytest.raises(CasemateError):
        parse_object(b'{"a":' * 100_000, "thing")


# files


def test_directories_go_with_what_is_in_them(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    files.write(str(place / "a"), b"content")
    assert files.read(str(place / "a"), 3) == b"con"
    files.remove(str(place / "nosuch"))
    files.remove_directory(str(place))
    assert not place.exists()
    files.remove_directory(str(place))
