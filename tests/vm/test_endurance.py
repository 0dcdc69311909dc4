"""Many starts through templates and the pool: nothing leaks, and no pod has what was another's.

CASEMATE_TEST_STARTS says how many starts each test makes, CASEMATE_TEST_AT_ONCE how many at a time. A leak of
one thing per start shows with a few; 1,000 are for what leaks seldom or little.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench import supervisor
from bench.instance import Instance
from config.load import load
from shim.vm.template import TemplateStore
from tests.vm import census, memory
from tests.vm.faults import comm, runs
from tests.vm.node import Node
from tests.vm.pods import Pods
from tests.vm.test_forkserver import CASEMATED, CONTAINERD, forked_by
from tests.vm.test_pool import Pool
from tests.vm.test_restore import digests

STARTS = int(os.environ.get("CASEMATE_TEST_STARTS") or 10)
AT_ONCE = int(os.environ.get("CASEMATE_TEST_AT_ONCE") or 2)
LIMIT_S = 300 + 30 * STARTS
WAITING = 2
"""Machines of the pool, where there is one."""
ALONE, POOL = "alone", "pool"
START_S = 120.0
SETTLING_S = 30.0
SETTLED = max(STARTS // 10, 4)
"""After so many starts a daemon has made what it makes once."""
MOST_GROWTH = {"containerd": 24 << 20, "fork server": 4 << 20, "casemated": 4 << 20}
"""Bytes of resident memory. Go's collector comes when it likes; casemated's part is a few pages."""

# Everything that a tenant could leave: files in every writable place, a freed and a held piece of memory.
POD = """\
marker=$1
found=$(ls -d /root/left-* /tmp/left-* /run/left-* /dev/shm/left-* 2>/dev/null)
for place in /root /tmp /run /dev/shm; do echo $marker > $place/left-$2; done
held=$marker
while [ ${#held} -lt 200000 ]; do held=$held$held; done
echo $held | cat > /tmp/freed
rm /tmp/freed
read -r boot_id < /proc/sys/kernel/random/boot_id
read -r uuid < /proc/sys/kernel/random/uuid
random=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n')
echo "$(cat /proc/sys/kernel/hostname) $boot_id $uuid $random $found"
read -r word
"""


class Markers:
    """What each pod is given that no other has, and that can be told from outside wherever it lies."""

    def __init__(self) -> None:
        self._tag = os.urandom(16).hex()
        self.pattern = re.compile(self._tag.encode() + b":([0-9]{8});")

    def of(self, number: int) -> str:
        return f"{self._tag}:{number:08};"

    def found_in(self, pids: set[int]) -> set[int]:
        """The numbers of the pods whose markers lie in these processes' memory."""
        return {int(match) for match in memory.found_in(pids, self.pattern)}


@dataclass(frozen=True, slots=True)
class Seen:
    """One pod. unique: what every pod has of its own."""

    unique: tuple[str, ...]
    source: str
    forked_by: str


@dataclass(frozen=True, slots=True)
class Held:
    """What a daemon holds."""

    descriptors: int
    threads: int
    resident_bytes: int

    def is_like(self, before: "Held") -> bool:
        """Whether no descriptors and no threads have come to stay."""
        return self.descriptors <= before.descriptors + 2 and self.threads <= before.threads + 8


def held_by(pid: int) -> Held:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return Held(
        len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), int(status["VmRSS"].split()[0]) << 10
    )


def kept(instance: Instance) -> Counter[str]:
    """How many files there are in what outlives a pod, which the census leaves out."""
    counts: Counter[str] = Counter()
    for name in ("ended", "cache", "users"):
        for _, directories, files in os.walk(instance.path(f"/run/casemate/{name}")):
            counts[name] += len(directories) + len(files)
    return counts


def start(pods: Pods, markers: Markers, number: int) -> Seen:
    """A pod's whole life, looked into while it holds what it was given."""
    name = pods.ctr.new_id("e")
    with pods.start("sh", "-c", POD, "pod", markers.of(number), str(number), name=name) as running:
        hostname, boot_id, uuid, random, *left = running.read_until(b"\n", START_S).decode().split()
        state = pods.state(name)
        assert state["source"] in ("restore", "pool"), pods.paths(name).log.read_text()
        processes = supervisor.descendants(state["pid"]) | {state["pid"]}
        (qemu,) = (pid for pid in processes if comm(pid).startswith("qemu") and runs(pid))
        guest, host = markers.found_in({qemu}), markers.found_in(processes - {qemu})
        parent = forked_by(pods, name)
        running.write(b"\n")
        result = running.finish(START_S)
    assert result.code == 0, result
    assert hostname == name
    # What a search from outside finds in a pod is its own, which shows that it would have found another's.
    assert guest == {number}
    assert host <= {number}
    assert not left
    unique = (hostname, boot_id, uuid, random)
    return Seen(unique, state["source"], parent)


@dataclass(slots=True)
class Beside:
    """What runs beside containerd: nothing, a casemated, or one that keeps machines."""

    instance: Instance
    node: Node | None = None
    pool: Pool | None = None

    def daemons(self) -> dict[str, int]:
        """Pids. A pool is full then: it holds something for each machine that waits."""
        found = {"containerd": self.instance.containerd_pid}
        if self.pool is not None:
            self.pool.wait_full(WAITING)
        if self.node is not None:
            found["fork server"] = self.node.wait_serving()
            found["casemated"] = self.node.pid
        return found

    def held(self) -> dict[str, Held]:
        return {name: held_by(pid) for name, pid in self.daemons().items()}

    def held_after(self, before: dict[str, Held]) -> dict[str, Held]:
        """As held(), once it is no more than they may have come to hold, or time is up: containerd lets go of
        what it had of a pod after the client has its answer, and tells nobody."""
        deadline = time.monotonic() + SETTLING_S
        while True:
            after = self.held()
            if all(now.is_like(before[name]) for name, now in after.items()) or time.monotonic() > deadline:
                return after
            time.sleep(0.1)

    def close(self) -> None:
        """What waits for pods ends with its casemated."""
        if self.node is not None:
            self.node.close()
        if self.pool is not None:
            self.pool.wait_gone()


@pytest.fixture
def beside(request: pytest.FixtureRequest, pods: Pods) -> Iterator[Beside]:
    found = Beside(pods.ctr.instance)
    if request.param != ALONE:
        found.node = Node(found.instance)
    if request.param == POOL:
        assert found.node is not None
        found.pool = Pool(pods, found.node)
    yield found
    found.close()


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("beside", [ALONE, CASEMATED, POOL], indirect=True)
def test_starts_leak_nothing_and_no_pod_has_what_was_anothers(
    pods: Pods, beside: Beside, image_store: Path
) -> None:
    instance = pods.ctr.instance
    store = TemplateStore(image_store.parent / "test-templates", Path("/nowhere"))
    pods.run("true").ok()
    key = store.list()[0].key
    template = digests(store, key)
    markers = Markers()

    with ThreadPoolExecutor(AT_ONCE) as threads:

        def started(first: int, end: int) -> list[Seen]:
            return list(threads.map(lambda number: start(pods, markers, number), range(first, end)))

        seen = started(0, AT_ONCE)
        everything = census.take(pods.ctr)
        if beside.pool is not None:
            beside.pool.start(WAITING)
        elif beside.node is not None:
            beside.node.start()
        seen += started(AT_ONCE, SETTLED)
        before, there = beside.held(), kept(instance)
        seen += started(SETTLED, STARTS)
        after = beside.held_after(before)

    casemateds = set(beside.daemons().values()) - {instance.containerd_pid}
    assert markers.found_in(casemateds.union(*map(supervisor.descendants, casemateds))) == set()
    beside.close()
    assert census.left_after(pods.ctr, everything) == []
    sources = Counter(one.source for one in seen)
    print(f"{STARTS} starts, {AT_ONCE} at once, {dict(sources)}: {there} -> {kept(instance)}")
    print(f"{before} -> {after}")

    assert (sources["pool"] >= min(WAITING, STARTS - AT_ONCE)) == (beside.pool is not None)
    usual = {CONTAINERD if beside.node is None else CASEMATED, *([POOL] if beside.pool else [])}
    others = [one.forked_by for one in seen[AT_ONCE:] if one.forked_by not in usual]
    # A fork server that does not answer at once, on a machine that others keep busy, is done without.
    assert others == [] or (set(others) == {CONTAINERD} and len(others) <= max(STARTS // 100, 1))
    for values in zip(*(one.unique for one in seen), strict=True):
        assert len(set(values)) == STARTS
    assert digests(store, key) == template

    for name, now in after.items():
        assert now.is_like(before[name]), name
        assert now.resident_bytes - before[name].resident_bytes < MOST_GROWTH[name], name
    assert len(list(instance.path("/run/casemate/ended").iterdir())) <= load().traces_kept + AT_ONCE
    assert kept(instance)["users"] <= there["users"] + AT_ONCE
    assert kept(instance)["cache"] <= there["cache"]
