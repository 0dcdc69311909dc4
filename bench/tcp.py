"""How fast a container talks to its host by TCP: bytes each way, and how long an answer takes.

The container is in a network namespace with a veth, as a CNI plugin makes them; the other end is in another
namespace of the host, where the clock is.
"""

from functools import partial

from bench import measures
from bench.netns import Namespace, connect, namespace
from bench.stand import RUN_S, Runner, Stand
from bench.timing import progress
from bench.turns import Action, Sample, Value, take_turns
from rpc.errors import DataLoss

ADDRESS, PEER, PORT = "10.77.0.2", "10.77.0.1", 8000
ANSWERS = 200
"""Bytes that go there and back, one after another; the median counts."""

SERVER = """\
import socket, sys
size, answers = int(sys.argv[1]), int(sys.argv[2])
with socket.create_server(("", int(sys.argv[3]))) as server:
    print("serving", flush=True)
    connection, _ = server.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
buffer = bytearray(1 << 20)
left = size
while left and (count := connection.recv_into(buffer)):
    left -= count
connection.sendall(b"y" if not left else b"n")
connection.recv_into(buffer)
for _ in range(size // len(buffer)):
    connection.sendall(buffer)
for _ in range(answers):
    connection.sendall(connection.recv(1))
"""
"""Runs in the container."""
CLIENT = """\
import socket, statistics, sys, time
size, answers = int(sys.argv[1]), int(sys.argv[2])
buffer = bytearray(1 << 20)
with socket.create_connection((sys.argv[4], int(sys.argv[3])), timeout=300) as connection:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    began = time.monotonic()
    for _ in range(size // len(buffer)):
        connection.sendall(buffer)
    whole = connection.recv(1) == b"y"
    there = time.monotonic() - began
    began, got = time.monotonic(), 0
    connection.sendall(b"x")
    while got < size and (count := connection.recv_into(buffer)):
        got += count
    back = time.monotonic() - began
    took = []
    for _ in range(answers):
        began = time.monotonic()
        connection.sendall(b"x")
        connection.recv(1)
        took.append(time.monotonic() - began)
print(int(whole and got == size), there, back, statistics.median(took))
"""
"""Runs on the host, in the namespace at the other end."""


def talk(stand: Stand, rounds: int, size_bytes: int, first_turn: int) -> tuple[Sample, ...]:
    """size_bytes: whole MiB, each way. Values are bytes per second, and seconds for an answer.

    Raises DataLoss if not all of it arrives.
    """
    actions: dict[str, Action] = {
        way: partial(_turn, runner, size_bytes) for way, runner in stand.runners.items()
    }
    what = f"{size_bytes // measures.MIB} MiB by TCP, each way"
    return tuple(
        take_turns(actions, rounds, first_turn=first_turn, on_round=progress(stand.say, what, rounds))
    )


def _turn(runner: Runner, size_bytes: int) -> list[Value]:
    before = runner.look()
    with namespace() as pod, namespace() as outside:
        connect(pod, "eth0", outside, "peer", (f"{ADDRESS}/24", f"{PEER}/24"))
        values = _talk(runner, pod, outside, size_bytes)
    runner.wait_gone(before)
    return values


def _talk(runner: Runner, pod: Namespace, outside: Namespace, size_bytes: int) -> list[Value]:
    name = runner.ctr.new_id("b")
    words = (str(size_bytes), str(ANSWERS), str(PORT))
    command = ("python3", "-uc", SERVER, *words)
    with runner.ctr.start(*runner.argv(name, *command, options=("--rm", *pod.options))) as running:
        running.read_until(b"\n", RUN_S)
        said = outside.run("python3", "-c", CLIENT, *words, ADDRESS).split()
        running.finish(RUN_S).ok()
    source = runner.note(name).source
    whole, there_s, back_s, answer_s = (float(word) for word in said)
    if not whole:
        raise DataLoss(f"{runner.way.name}: not all of {size_bytes} bytes went there and back")
    return [
        Value(measures.TCP_IN, size_bytes / there_s, source),
        Value(measures.TCP_OUT, size_bytes / back_s, source),
        Value(measures.TCP_ANSWER, answer_s, source),
    ]
