"""A guest that answers the shim's own questions with anything at all: each call of a client's is answered or
refused in words of ours, what containerd is told is fit to be told, the pod can be ended, and nothing of the
host has moved.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rpc.api import agent as api
from rpc.api.cgroups import Metrics
from rpc.codec import Message
from rpc.errors import CasemateError, Code
from rpc.method import Method
from shim import container
from tests.unit.rpc.wires import run, until
from tests.unit.shim.pods import POD, PodOfTest, config, running_pod

UNSIGNED = {"uint32": 32, "uint64": 64}
SIGNED = {"int32": 32, "int64": 64, "sint32": 32, "sint64": 64, "enum": 32}
EVIL = (
    "",
    POD,
    "shell",
    "..",
    "../../../../etc/passwd",
    "/",
    "a/b",
    "\0",
    "\x1b[2J",
    "x" * 100_000,
    "\U0010ffff",
)


def bytes_as(declared: type[Message], said: bytes) -> Any:
    """Sent as they are, in place of such a message."""
    message: Any = declared()

    def encode_into(out: list[Any]) -> int:
        out.append(said)
        return len(said)

    message.encode_into, message.encode = encode_into, lambda: said
    return message


def number(bits: int, signed: bool) -> st.SearchStrategy[int]:
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return st.sampled_from((least, most, 0, 1, 255, 256, most // 2)) | st.integers(least, most)


def value_of(kind: str, message: type[Message] | None) -> st.SearchStrategy[Any]:
    if message is not None:
        return message_of(message)
    if kind in UNSIGNED or kind in SIGNED:
        return number(UNSIGNED.get(kind) or SIGNED[kind], kind in SIGNED)
    return {
        "string": st.sampled_from(EVIL) | st.text(max_size=20),
        "bytes": st.binary(max_size=200) | st.just(bytes(container.READ_BYTES + 1)),
        "bool": st.booleans(),
        "double": st.floats(),
    }[kind]


def message_of(declared: type[Message]) -> st.SearchStrategy[Message]:
    """Any that the declaration allows."""
    fields = {}
    for field in declared.FIELDS:
        one = value_of(field.kind, field.message)
        if field.key:
            one = st.dictionaries(st.sampled_from(EVIL), one, max_size=3)
        elif field.repeated:
            one = st.lists(one, max_size=3)
        fields[field.name] = one
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: declared(**values))


ERRORS = st.builds(
    lambda words, code: CasemateError(words, code=code),
    st.sampled_from(EVIL),
    st.sampled_from([code for code in Code if code is not Code.OK]),
)
GARBAGE = st.binary(max_size=60)
HONEST = "honest"
MOST_TOLD = 8000
"""Characters of an error that a client is shown."""


def answer_of(method: Method[Any, Any]) -> st.SearchStrategy[Any]:
    said = message_of(method.response) | GARBAGE | ERRORS | st.just(HONEST)
    if method is api.STATS:
        said |= message_of(Metrics).map(lambda metrics: api.StatsResponse(metrics=metrics.encode()))
    return said


ASKED = (
    api.CREATE_CONTAINER,
    api.START_CONTAINER,
    api.EXEC,
    api.SIGNAL,
    api.DELETE,
    api.READ_OUTPUT,
    api.RESIZE,
    api.PAUSE,
    api.RESUME,
    api.UPDATE,
    api.STATS,
    api.SYNC,
)
NOT_ASKED = {
    api.HELLO: "test_hello.py",
    api.MOUNT_SHARE: "answers nothing that is read",
    api.NETWORK: "answers nothing that is read",
    api.CLOCK: "test_clock.py",
    api.DEVICES: "test_passthrough.py",
    api.WRITE_STDIN: "answers nothing that is read",
    api.CLOSE_STDIN: "answers nothing that is read",
    api.PREPARE: "of a template's guest, before there is a pod",
    api.REHEARSE: "of a template's guest, before there is a pod",
    api.SHUTDOWN: "not asked of a pod's guest",
    api.EVENTS: "a stream: EVENTS below",
}
ANSWERS = st.fixed_dictionaries({method.name: answer_of(method) for method in ASKED})
EVENTS = st.lists(message_of(api.Event) | GARBAGE | st.just(HONEST), max_size=6)


def misbehave(tested: PodOfTest, answers: dict[str, Any]) -> None:
    """From now on the guest says these."""

    def saying(
        method: Method[Any, Any], said: Any, honest: Callable[[Any], Awaitable[Any]]
    ) -> Callable[[Any], Awaitable[Any]]:
        async def handle(request: Any) -> Any:
            if said == HONEST:
                return await honest(request)
            if isinstance(said, CasemateError):
                raise CasemateError(said.brief, code=said.code)
            return bytes_as(method.response, said) if isinstance(said, bytes) else said

        return handle

    honest = tested.agent._handlers()
    for method in ASKED:
        tested.agent.answer(method, saying(method, answers[method.name], honest[method]))


def tell(tested: PodOfTest, events: list[Any]) -> None:
    for event in events:
        honest = api.Event(kind=api.EventKind.EXIT, container_id=POD, exit_status=3)
        if isinstance(event, bytes):
            event = bytes_as(api.Event, event)
        tested.agent._events.put_nowait(honest if event == HONEST else event)


async def life(tested: PodOfTest, early: list[Any], events: list[Any]) -> None:
    """What a client asks. Only errors of ours come of it."""
    pod = tested.pod

    async def ask(asked: Awaitable[Any]) -> None:
        try:
            await asked
        except CasemateError as error:
            told = str(error)
            assert len(told) < MOST_TOLD, f"{len(told)} characters: {told[:200]}"
            assert told.replace("\n", "").isprintable(), repr(told[:200])

    async def exec_() -> None:
        tested.add_exec("shell")
        await pod.start(POD, "shell")

    await pod.machine()
    tell(tested, early)
    await ask(tested.create())
    await ask(pod.start(POD))
    await ask(exec_())
    tell(tested, events)
    lost = tested.guest.machine.lost  # as events cannot be read: nobody takes the rest
    await until(lambda: tested.agent._events.empty() or lost.done())
    for _ in range(50):
        await asyncio.sleep(0)
    await ask(pod.stats(POD))
    await ask(pod.update(POD, b'{"pids": {"limit": 7}}'))
    await ask(pod.resize(POD, "", 80, 24))
    await ask(pod.pause(POD))
    await ask(pod.resume(POD))
    await ask(pod.kill(POD, "shell", 15))
    await ask(pod.delete(POD, "shell"))
    await ask(pod.kill(POD, "", 15))
    if POD in pod.containers:
        # Whatever it said: it has no say in its machine's end, nor in that it is told.
        tested.guest.machine.qemu.kill()
        await pod.containers[POD].init.exited.wait()
        _, end = await pod.delete(POD)
        assert 0 <= end.exit_status <= 255
        assert pod.trace.created_at * 1e9 <= end.exited_at_ns
    assert not pod.containers
    await pod.stop()


@pytest.fixture
def hurried() -> Iterator[None]:
    """Output that a guest never ends is not waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "DRAIN_S", 0.05)
        patch.setattr(container, "FLUSH_S", 0.05)
        yield


def test_every_method_is_asked_or_has_a_reason() -> None:
    assert set(api.METHODS) == {*ASKED, *NOT_ASKED}
    assert not set(ASKED) & NOT_ASKED.keys()


HONEST_ANSWERS = dict.fromkeys((method.name for method in ASKED), HONEST)
LAST = (1 << 63) - 1


@pytest.mark.usefixtures("hurried")
@settings(max_examples=40)
@given(ANSWERS, EVENTS, EVENTS)
@example(
    HONEST_ANSWERS, [], [api.Event(kind=1, container_id=POD, exit_status=(1 << 32) - 1, exited_at_ns=-LAST)]
)
@example(HONEST_ANSWERS, [], [api.Event(kind=1, container_id=POD, exec_id="..", exited_at_ns=LAST)])
@example(HONEST_ANSWERS, [], [api.Event(kind=2, container_id=POD)] * 1000)
@example({**HONEST_ANSWERS, "ReadOutput": api.ReadOutputResponse(data=b"x")}, [], [])
@example({**HONEST_ANSWERS, "CreateContainer": b"\xff" * 1000, "Stats": b"\x0a\xff"}, [], [b"\xff" * 50])
@example({**HONEST_ANSWERS, "Stats": api.StatsResponse(metrics=b"\xff" * 1000)}, [], [])
@example({**HONEST_ANSWERS, "CreateContainer": CasemateError("\x1b[2J" + "x" * (3 << 20))}, [], [])
def test_a_guest_that_says_anything(
    tmp_path_factory: pytest.TempPathFactory, answers: dict[str, Any], early: list[Any], events: list[Any]
) -> None:
    directory = tmp_path_factory.mktemp("pod")
    unseen: list[dict[str, Any]] = []

    async def test() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        before = len(os.listdir("/proc/self/fd"))
        async with running_pod(directory, begun=False) as tested:
            misbehave(tested, answers)
            tested.pod.begin(config(), 0.0)
            await life(tested, early, events)
            for event in tested.recorder.events:
                type(event).decode(event.encode())
            json.loads(tested.pod.paths.state.read_text())
            json.loads(tested.pod.paths.trace.read_text())
            assert list(tested.guest.machine.share.iterdir()) == []
        assert len(os.listdir("/proc/self/fd")) == before

    run(test())
    assert not unseen
    assert {path.name for path in directory.iterdir()} == {"run", "bundles"}
    assert {path.name for path in (directory / "bundles").rglob("*")} == {POD, "config.json", "rootfs"}
