"""One run of `casemate bench`: a stand, what is measured on it, and the document that comes of it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import crowd, files, machine, measures, output, payload, settings, storage, tcp, timing
from bench.density import density
from bench.document import KINDS, Document, Failure, Life, ProcessShare, Trials, WayFacts
from bench.instance import CHECKOUT, containerd_in
from bench.stand import Runner, Say, Stand, demo_archive, scratch_directory
from bench.turns import FEWEST_ROUNDS, Sample
from bench.ways import Way, parse_all
from config.load import load
from rpc.errors import InvalidArgument, NotFound
from shim.vm import designer

# Memory hardly varies, and each weighing takes as many starts as there are pods.
MOST_WEIGHINGS = 2
# Each has a sample of every client.
CROWDS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says. containerd: the directory of one that is not on the PATH.

    parallel: clients of each turn of exec. crowd: how many start at once, after those that start alone;
    crowds: how often at most.
    machine: what a report calls this one. commit: this casemate's, where it has been installed without git's
    knowledge.
    """

    ways: tuple[str, ...]
    rounds: int = 10
    parallel: int = 1
    crowd: int = 1
    crowds: int = CROWDS
    pods: int = 10
    settle_s: float = 5.0
    size_bytes: int = 64 * measures.MIB
    containerd: Path | None = None
    archive: Path | None = None
    machine: str = ""
    commit: str = ""

    def check(self) -> list[Way]:
        """The ways that are meant. Raises InvalidArgument."""
        ways = parse_all(self.ways)
        if self.rounds < FEWEST_ROUNDS and len(self.ways) > 1:
            raise InvalidArgument(f"{self.rounds} round of several runtimes interleaves nothing: 2 at least")
        if self.size_bytes < measures.MIB or self.size_bytes % measures.MIB:
            raise InvalidArgument("the file to be read has to be of whole MiB")
        return ways


def default_ways(all_of_them: bool = False) -> tuple[str, ...]:
    """runc first: ratios are to it.

    All of them: crun where it is, casemate beside casemated, with its pool, with virtio-fs where it is not
    the only way that files come, and booting.
    """
    names = ["runc", "casemate"]
    if all_of_them:
        import shutil

        names[1:1] = ["crun"] if shutil.which("crun") else []
        names += ["casemate-node", "casemate-pool"]
        names += ["casemate-virtiofs"] if designer.transport_of(load().transport) == "vsock" else []
        names += ["casemate-boot"] if settings.restores(CHECKOUT, "") else []
    return tuple(names)


def shows_something(kind: str, way: Way) -> bool:
    """Whether such a run is worth its time: how a machine came to be counts for its start and its memory.

    kind: one of KINDS, or "crowd" for the many at once of "boot".
    """
    surroundings = way.surroundings
    if surroundings.template == "off":
        return kind == "boot"
    if surroundings.pool:
        return kind in ("boot", "crowd")
    if surroundings.files:
        return kind in ("boot", "density", "files")
    if "crun" in way.programs:
        return kind not in ("crowd", "files")
    return kind != "files" or not surroundings.casemated


def run(
    kinds: Sequence[str],
    options: Options,
    say: Say,
    wanted: Callable[[str, Way], bool] = lambda kind, way: True,
) -> Iterator[Document]:
    """One document for each of kinds as soon as there is one, all measured on one stand.

    wanted: which ways take part in which kind. Raises CasemateError.
    """
    ways = options.check()
    binaries = containerd_in(options.containerd) if options.containerd else None
    if options.containerd and binaries is None:
        raise NotFound(f"no containerd in {options.containerd}")
    with contextlib.ExitStack() as undo:
        scratch = undo.enter_context(scratch_directory())
        archive = options.archive
        if archive is None:
            archive = scratch / "demo.tar"
            demo_archive(archive)
        if {"io", "files"} & set(kinds):
            file, image = scratch / payload.NAME, scratch / "image.tar"
            payload.random_file(file, options.size_bytes)
            payload.add_layer(archive, file, image)
            file.unlink()
            archive = image
        stand = undo.enter_context(Stand(ways, archive, say, binaries=binaries))
        stand.warm_up()
        for kind in kinds:
            with stand.among([way.name for way in ways if wanted(kind, way)]):
                yield _measure(kind, stand, options, wanted)


def _measure(kind: str, stand: Stand, options: Options, wanted: Callable[[str, Way], bool]) -> Document:
    host, began_at, began_s = machine.facts(), time.time(), time.monotonic()
    for runner in stand.runners.values():
        runner.facts_seen.clear()
    samples: tuple[Sample, ...]
    lives: tuple[Life, ...] = ()
    processes: tuple[ProcessShare, ...] = ()
    failures: tuple[Failure, ...] = ()
    trials: tuple[Trials, ...] = ()
    words = [word for word, way in zip(options.ways, stand.ways, strict=True) if way.name in stand.runners]
    said: dict[str, Any] = {"runtimes": words, "rounds": options.rounds}
    match kind:
        case "boot":
            timed = timing.boot(stand, options.rounds)
            samples, lives, said["crowd"] = timed.samples, timed.lives, options.crowd
            if options.crowd > 1:
                rounds = min(options.rounds, options.crowds)
                with stand.among(
                    [name for name, runner in stand.runners.items() if wanted("crowd", runner.way)]
                ):
                    many = crowd.start_at_once(stand, rounds, options.crowd, samples)
                samples, failures = samples + many.samples, many.failures
                said["crowds"] = rounds
        case "exec":
            timed = timing.execute(stand, options.rounds, options.parallel)
            samples, said["parallel"] = timed.samples, options.parallel
        case "delete":
            samples = timing.delete(stand, options.rounds).samples
        case "density":
            rounds = min(options.rounds, MOST_WEIGHINGS)
            weighed = density(stand, rounds, options.pods, options.settle_s)
            samples, processes = weighed.samples, weighed.processes
            said |= {"rounds": rounds, "pods": options.pods, "settle_s": options.settle_s}
        case "io":
            samples = storage.read_sequentially(stand, options.rounds, options.size_bytes)
            for more in (tcp.talk, output.speak):
                samples += more(stand, options.rounds, options.size_bytes, samples[-1].turn + 1)
            said["size_bytes"] = options.size_bytes
        case "files":
            done = files.behaviour(stand, options.rounds, options.size_bytes)
            samples, trials, said["size_bytes"] = done.samples, done.trials, options.size_bytes
        case _:
            raise InvalidArgument(f"{kind} is none of {', '.join(KINDS)}")
    return Document(
        kind=kind,
        ways=tuple(_facts(runner, options.commit) for runner in stand.runners.values()),
        samples=samples,
        host=host | {"load_after": machine.facts()["load"]},
        versions=machine.versions(
            stand.ways,
            stand.binaries.version,
            stand.settings.qemu,
            stand.guest_image,
            options.commit or machine.commit(CHECKOUT),
        ),
        options=said,
        lives=lives,
        processes=processes,
        failures=failures,
        files=_files(stand),
        began_at=began_at,
        took_s=time.monotonic() - began_s,
        machine=options.machine,
        trials=trials,
    )


def _facts(runner: Runner, commit: str) -> WayFacts:
    """commit: of the checkout that runs this, where it cannot say it itself."""
    way, checkout = runner.way, runner.way.surroundings.checkout
    seen = sorted(runner.facts_seen, key=lambda facts: facts.source)
    if not seen:
        return WayFacts(way.name, way.runtime)
    return WayFacts(
        way.name,
        way.runtime,
        (commit if checkout == CHECKOUT else "") or machine.commit(checkout),
        seen[0].accel,
        seen[0].accel_reason,
        tuple(dict.fromkeys(facts.source for facts in seen)),
        seen[0].vcpus,
        seen[0].memory_bytes,
        way.surroundings.casemated,
        tuple(sorted({facts.files for facts in seen if facts.files})),
    )


def _files(stand: Stand) -> dict[str, int]:
    """The guest image's files and their bytes."""
    if stand.guest_image is None:
        return {}
    return {name: int(entry["bytes"]) for name, entry in stand.guest_image.manifest["files"].items()}
