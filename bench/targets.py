"""What casemate is meant to reach, and whether a set of runs shows that it does.

A target that the runs say nothing about is "not measured", with the reason; it is never left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from bench import measures, stats
from bench.document import Document, WayFacts
from bench.instance import RUNTIME
from rpc.errors import CasemateError

RUNC = "runc"
KATA_X_RUNC = 10.3
"""Kata Containers 4.1.0, `ctr run` of true, medians of 4, in the emulated host whose guests have KVM."""
GUEST_MEMORY_BYTES, GUEST_VCPUS = 256 * measures.MIB, 1
PODS = 10
CROWD = 32
CROWD_X_SERIAL = 3.0
BOOTED, RESTORED, POOLED = "boot", "restore", "pool"
"""What state.json calls a machine's source."""


class Bound(StrEnum):
    AT_MOST = "at most"
    AT_LEAST = "at least"


class Verdict(StrEnum):
    REACHED = "reached"
    MISSED = "missed"
    NOT_MEASURED = "not measured"
    NONE = "no target"  # for this acceleration


@dataclass(frozen=True, slots=True)
class Found:
    """value is in the target's unit; detail is the spread or the confidence interval, for a person.

    spoilt: what makes any value a target that was missed; empty where nothing does.
    command: what measured it, without how often and beside what.
    """

    value: float
    detail: str
    accel: str
    spoilt: str = ""
    command: str = ""


class NotMeasured(Exception):
    """The text is the reason."""


@dataclass(frozen=True, slots=True)
class Target:
    """limits: the most or the least that is allowed, by what accelerates the guests ("kvm", "tcg"). Without
    any, the value is there to be seen."""

    name: str
    text: str
    unit: str
    limits: Mapping[str, float]
    find: Callable[[Sequence[Document]], Found]
    bound: Bound = Bound.AT_MOST

    def allows(self, value: float, limit: float) -> bool:
        return value <= limit if self.bound is Bound.AT_MOST else value >= limit


@dataclass(frozen=True, slots=True)
class Judged:
    target: Target
    verdict: Verdict
    found: Found | None = None
    limit: float | None = None
    reason: str = ""


def judge(documents: Sequence[Document]) -> list[Judged]:
    """Every target, in the order of TARGETS."""
    return [_judge(target, documents) for target in TARGETS]


def _judge(target: Target, documents: Sequence[Document]) -> Judged:
    try:
        found = target.find(documents)
    except NotMeasured as reason:
        return Judged(target, Verdict.NOT_MEASURED, reason=str(reason))
    if not target.limits:
        return Judged(target, Verdict.NONE, found, reason="reported only")
    limit = target.limits.get(found.accel)
    if limit is None:
        return Judged(target, Verdict.NONE, found, reason=f"none is set for {found.accel or 'this'}")
    reached = not found.spoilt and target.allows(found.value, limit)
    return Judged(target, Verdict.REACHED if reached else Verdict.MISSED, found, limit, found.spoilt)


def _newest(documents: Sequence[Document], kind: str) -> list[Document]:
    """Those of more rounds first: a crowd's run, kept beside, has few starts to compare it with."""
    of_kind = [one for one in documents if one.kind == kind]
    found = sorted(of_kind, key=lambda one: (-one.options.get("rounds", 0), -one.began_at))
    if not found:
        raise NotMeasured(f"no run of `casemate bench {kind}`")
    return found


def _way(document: Document, measure: str, source: str, casemated: bool) -> WayFacts | None:
    """The casemate of a run whose pods all came from `source` (any, if that is empty) and had the size."""
    for way in document.ways:
        sources = document.sources(way.name, measure)
        ours = way.runtime == RUNTIME and way.casemated == casemated
        if ours and sources and (not source or sources == {source}):
            return way
    return None


def _measured(
    documents: Sequence[Document], kind: str, measure: str, source: str, casemated: bool = False
) -> tuple[Document, WayFacts]:
    """The newest run that has it, with guests of the size that the targets are set for."""
    for document in _newest(documents, kind):
        way = _way(document, measure, source, casemated)
        if way is None:
            continue
        if (way.vcpus, way.memory_bytes) != (GUEST_VCPUS, GUEST_MEMORY_BYTES):
            size = f"{way.vcpus} vCPUs and {way.memory_bytes // measures.MIB} MiB"
            raise NotMeasured(f"the guests had {size}, the target is for 1 and 256 MiB")
        return document, way
    if casemated and not source:
        raise NotMeasured("no casemate beside casemated in the run")
    came = {"": "no casemate in the run", BOOTED: "no pod was made to boot"}
    raise NotMeasured(came.get(source, f"no run whose pods all came from: {source}"))


def _ratio(
    kind: str, measure: str, source: str, documents: Sequence[Document], casemated: bool = False
) -> Found:
    document, way = _measured(documents, kind, measure, source, casemated)
    try:
        found = stats.ratio(document.samples, measure, way.name, RUNC)
    except CasemateError as error:
        raise NotMeasured(str(error)) from None
    return Found(found.value, f"{found.low:.2f} to {found.high:.2f}", way.accel, command=_command(document))


def _median(
    kind: str, measure: str, source: str, documents: Sequence[Document], casemated: bool = False
) -> Found:
    document, way = _measured(documents, kind, measure, source, casemated)
    if kind == "density" and measure == measures.PSS and document.options.get("pods", 0) < PODS:
        raise NotMeasured(f"the run had {document.options.get('pods')} pods up, the target is for {PODS}")
    found = stats.summary(document.values(way.name, measure))
    about = measures.MEASURES[measure]
    spread = f"{about.show(found.least)} to {about.show(found.most)}"
    return Found(found.median / about.scale, spread, way.accel, command=_command(document))


def _command(document: Document) -> str:
    return f"casemate bench {document.kind}"


def _crowd(pooled: bool, documents: Sequence[Document]) -> Found:
    """p95 of CROWD starts at once, in units of what CROWD / cores starts one after another take.

    Both are of one run. On more cores than starts it is compared with one start. Pods that fail have no time.
    """
    for document in _newest(documents, "boot"):
        way = _way(document, measures.RUN, POOLED if pooled else RESTORED, pooled)
        if document.options.get("crowd", 1) != CROWD or way is None:
            continue
        alone_s = stats.summary(document.values(way.name, measures.RUN)).median
        many = document.values(way.name, measures.MANY_RUN)
        p95_s, cpus = stats.summary(many).p95, document.host["cpus"]
        failed = [failure for failure in document.failures if failure.way == way.name]
        sources = " and ".join(sorted(document.sources(way.name, measures.MANY_RUN)))
        return Found(
            p95_s / (alone_s * max(CROWD / cpus, 1.0)),
            f"p95 {p95_s:.2f} s of {len(many)}, from {sources}; alone {alone_s:.2f} s; {cpus} CPUs",
            way.accel,
            f"{len(failed)} of {len(failed) + len(many)} failed" if failed else "",
            f"{_command(document)} --parallel {CROWD}",
        )
    raise NotMeasured(
        f"no run of `casemate bench boot --parallel {CROWD}` whose pods came from: "
        + (POOLED if pooled else RESTORED)
    )


TARGETS = (
    Target(
        "outside",
        "`ctr run` of `true` outside the guest's own boot and run",
        "s",
        {"tcg": 0.6},
        partial(_median, "boot", measures.OUTSIDE, ""),
    ),
    Target(
        "guest_boot",
        "guest power-on to the agent's answer",
        "s",
        {"tcg": 3.0},
        partial(_median, "boot", measures.GUEST_BOOT, BOOTED),
    ),
    Target(
        "delete",
        "deletion of a task that has ended",
        "s",
        {"tcg": 0.3},
        partial(_median, "delete", measures.DELETE, ""),
    ),
    Target(
        "pss.host",
        "host PSS of an idle pod beyond the guest RAM that it touched",
        "MiB",
        {"tcg": 120.0},
        partial(_median, "density", measures.PSS_HOST, ""),
    ),
    Target(
        "start.restored",
        "`ctr run` of `true`, the machine restored",
        "x runc",
        {"kvm": 1.5, "tcg": 6.0},
        partial(_ratio, "boot", measures.RUN, RESTORED),
    ),
    Target(
        "start.pooled",
        "`ctr run` of `true`, the machine from the pool",
        "x runc",
        {"kvm": 1.0, "tcg": 1.0},
        partial(_ratio, "boot", measures.RUN, POOLED, casemated=True),
    ),
    Target(
        "start.booted",
        f"`ctr run` of `true`, the machine booted: half of Kata's {KATA_X_RUNC} x runc",
        "x runc",
        {"kvm": 0.5 * KATA_X_RUNC},
        partial(_ratio, "boot", measures.RUN, BOOTED),
    ),
    Target(
        "exec",
        "`ctr task exec` of `true`",
        "x runc",
        {"kvm": 1.2, "tcg": 2.0},
        partial(_ratio, "exec", measures.EXEC, ""),
    ),
    Target(
        "kill",
        "KILL to everything gone",
        "x runc",
        {"kvm": 1.0, "tcg": 1.5},
        partial(_ratio, "delete", measures.KILL_GONE, ""),
    ),
    Target(
        "pss",
        f"PSS of an idle pod, {PODS} up",
        "MiB",
        {"kvm": 45.0, "tcg": 45.0},
        partial(_median, "density", measures.PSS, ""),
    ),
    Target(
        "pss.shim",
        f"PSS of the shim of an idle pod, {PODS} up, forked by casemated",
        "MiB",
        {"kvm": 12.0, "tcg": 12.0},
        partial(_median, "density", measures.PSS_SHIM, "", casemated=True),
    ),
    Target(
        "crowd.restored",
        f"{CROWD} pods at once, restored: no failure; the slow end (p95) of `ctr run`, "
        f"by {CROWD} / CPUs starts one after another",
        "x",
        {"kvm": CROWD_X_SERIAL, "tcg": CROWD_X_SERIAL},
        partial(_crowd, False),
    ),
    Target(
        "crowd.pooled",
        "the same beside casemated, from the pool",
        "x",
        {"kvm": CROWD_X_SERIAL, "tcg": CROWD_X_SERIAL},
        partial(_crowd, True),
    ),
    Target(
        "read.rootfs",
        "a file of the image, read from the host's page cache",
        "x runc",
        {},
        partial(_ratio, "io", measures.ROOTFS_WARM, ""),
    ),
    Target(
        "read.volume",
        "a file of a bind-mounted volume, read from the host's page cache",
        "x runc",
        {},
        partial(_ratio, "io", measures.VOLUME_WARM, ""),
    ),
    Target(
        "read.block",
        "a block device, read with O_DIRECT",
        "x runc",
        {"kvm": 0.9, "tcg": 0.9},
        partial(_ratio, "io", measures.BLOCK, ""),
        Bound.AT_LEAST,
    ),
    Target(
        "output",
        "a container's output, as its client reads it: 200 MB/s",
        "MiB/s",
        {"kvm": 200e6 / measures.MIB},
        partial(_median, "io", measures.OUTPUT, ""),
        Bound.AT_LEAST,
    ),
    Target(
        "tcp.in",
        "TCP from a pod's host to the pod",
        "x runc",
        {},
        partial(_ratio, "io", measures.TCP_IN, ""),
    ),
    Target(
        "tcp.out",
        "TCP from a pod to its host",
        "x runc",
        {},
        partial(_ratio, "io", measures.TCP_OUT, ""),
    ),
    Target(
        "tcp.answer",
        "a byte by TCP to a pod and back",
        "x runc",
        {},
        partial(_ratio, "io", measures.TCP_ANSWER, ""),
    ),
)
