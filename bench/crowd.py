"""Many starts at once: what each client waits for, and which of them fail.

A failure is a result here, kept in its own words, and not the end of the run: only what would have counted
one can say that there was none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from bench import measures
from bench.document import Failure
from bench.stand import Runner, Stand
from bench.timing import BYTE, Client, at_once, in_turns
from bench.turns import Sample, Value
from rpc.errors import FailedPrecondition

WORDS = 2000
"""Characters of a failure that are kept: the end, where the reason stands."""


@dataclass(frozen=True, slots=True)
class Crowd:
    samples: tuple[Sample, ...]
    failures: tuple[Failure, ...]


def start_at_once(stand: Stand, rounds: int, clients: int, before: Sequence[Sample]) -> Crowd:
    """before: the samples that the run has already. Raises FailedPrecondition if every client of a turn
    failed: then there is nothing to measure."""
    failures: list[Failure] = []
    rounds_begun = dict.fromkeys(stand.runners, 0)

    def turn(runner: Runner) -> list[Value]:
        way = runner.way.name
        number = rounds_begun[way]
        rounds_begun[way] += 1
        there = runner.look()
        ended = at_once(runner, clients, ("echo", BYTE.decode()))
        gone_s = runner.wait_gone(there)
        done = [one for one in ended if isinstance(one, Client)]
        failed = [str(one)[-WORDS:] for one in ended if not isinstance(one, Client)]
        failures.extend(Failure(way, number, words) for words in failed)
        if failed:
            stand.say(f"{way}: {len(failed)} of {clients} clients failed: {failed[0]}")
        if not done:
            raise FailedPrecondition(f"{way}: all of {clients} clients at once failed", details=failed[0])
        values = []
        for client in done:
            source = runner.note(client.name).source
            values.append(Value(measures.MANY_FIRST_BYTE, client.first_byte_s - client.exec_s, source))
            values.append(Value(measures.MANY_RUN, client.exit_s - client.exec_s, source))
        whole_s = max(gone_s, *(one.exit_s for one in done)) - min(one.exec_s for one in done)
        return [*values, Value(measures.MANY_GONE, whole_s, values[-1].source)]

    samples = in_turns(stand, turn, rounds, f"{clients} at once", before)
    return Crowd(tuple(samples), tuple(failures))
