"""Pods that are restored from a template: what clones must not share, and what a bad template may cost."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from shim.journal import Kind, read_journal
from shim.vm import template
from shim.vm.template import MANIFEST, RAM, STATE, TemplateStore
from tests.vm.faults import comm, kill_and_wait, script
from tests.vm.node import Node
from tests.vm.operator import casemate
from tests.vm.pods import Pods

MADE_S = 180.0
"""A boot at the lowest priority, on a machine that is busy with others."""
BOOTED = "the guest is booted, as it cannot be restored"

PLACES = ("/dev/shm", "/root", "/run", "/tmp")
HOLD = 'import sys; held = sys.argv[1].encode() * 1000000; print("held", flush=True); input()'

FACTS = """\
import json, os, socket, struct, time
def read(name):
    with open(name) as file:
        return file.read().strip()
with open('/dev/urandom', 'rb', buffering=0) as file:
    first = file.read(16).hex()
with open('/proc/self/auxv', 'rb') as file:
    auxv = dict(struct.iter_unpack('QQ', file.read()))
with open('/proc/self/mem', 'rb', buffering=0) as file:
    file.seek(auxv[25])  # AT_RANDOM
    at_random = file.read(16).hex()
maps = {line.split()[-1]: line.split('-')[0] for line in read('/proc/self/maps').splitlines()}
print(json.dumps({
    'differ': {
        'urandom': first, 'getrandom': os.getrandom(16).hex(), 'at_random': at_random,
        'boot_id': read('/proc/sys/kernel/random/boot_id'), 'uuid': read('/proc/sys/kernel/random/uuid'),
        'stack': maps['[stack]'], 'vdso': maps['[vdso]'],
    },
    'heap': maps['[heap]'],
    'machine_ids': [name for name in os.listdir('/sys/class/dmi/id') if 'uuid' in name],
    'hostname': socket.gethostname(), 'monotonic': time.monotonic(), 'boottime': time.clock_gettime(7),
    'time': time.time(), 'uptime': float(read('/proc/uptime').split()[0]),
}), flush=True)
"""


class Templates:
    """The templates of one test: an operator's directory, and what the host knows of it."""

    def __init__(self, pods: Pods, directory: Path) -> None:
        self.pods = pods
        self.instance = pods.ctr.instance
        self.store = TemplateStore(directory, self.instance.path("/run/casemate/cache/templates"))

    def configure(self, more: str = "", *, make: bool = False) -> None:
        made = "true" if make else "false"
        self.instance.configure(f'template_dir = "{self.store.root}"\nmake_templates = {made}\n{more}')

    def wait_made(self, count: int = 1) -> tuple[str, ...]:
        """The keys, once there are so many. A maker is nobody's child here: hence a bounded poll."""
        deadline = time.monotonic() + MADE_S
        while len(keys := self.store.keys()) < count:
            assert time.monotonic() < deadline, f"no template within {MADE_S} s: {keys}"
            time.sleep(0.1)
        return keys

    def build(self, *words: str) -> list[str]:
        """`casemate template build`; the keys of what was made."""
        done = casemate(self.instance, "template", "build", "--json", *words)
        assert done.returncode == 0, done.stderr
        return [made["key"] for made in json.loads(done.stdout)["made"]]

    def source(self, *options: str) -> str:
        """How a pod came to run that does what it should."""
        with self.pods.detached("sleep", "1000", options=options) as name:
            assert self.pods.exec(name, "echo", "works").ok().out == "works\n"
            return str(self.pods.state(name)["source"])

    def staged(self) -> list[str]:
        return sorted(path.name for path in (self.store.root / "tmp").glob("*"))


@pytest.fixture
def nothing(pods: Pods) -> Iterator[Templates]:
    """No template, and no memory of one."""
    directory = pods.ctr.instance.work / f"templates-{pods.ctr.new_id()}"
    directory.mkdir()
    for memory in ("restorable", "templates"):
        shutil.rmtree(pods.ctr.instance.path(f"/run/casemate/cache/{memory}"), ignore_errors=True)
    templates = Templates(pods, directory)
    templates.configure()
    yield templates
    shutil.rmtree(directory)


@pytest.fixture
def one(nothing: Templates, image_store: Path) -> Templates:
    """A copy of the default shape's template, for a test to damage. Its key is that of the original."""
    nothing.instance.clear_config()
    nothing.pods.run("true").ok()
    common = TemplateStore(image_store.parent / "test-templates", Path("/nowhere"))
    used = common.list()[0]
    subprocess.run(["cp", "-a", "--sparse=always", used.directory, nothing.store.root], check=True)
    nothing.configure()
    return nothing


def digests(store: TemplateStore, key: str) -> dict[str, str]:
    with template._opened(store.root / key) as files:
        return {name: template.digest_of(files[name]) for name in (RAM, STATE)}


# -- clones --------------------------------------------------------------------------------------------------


def facts(pods: Pods) -> dict[str, Any]:
    before = time.time()
    result = pods.run("python3", "-c", FACTS).ok()
    found: dict[str, Any] = json.loads(result.out)
    assert before - 1 < found["time"] < time.time() + 1
    return found


def test_clones_differ_in_all_that_must_differ(pods: Pods) -> None:
    clones = [facts(pods) for _ in range(3)]
    for name in clones[0]["differ"]:
        values = [clone["differ"][name] for clone in clones]
        assert len(set(values)) == 3, f"{name}: {values}"
    # Of 8192 places (arch_randomize_brk): two of three are in the same one now and then.
    assert len({clone["heap"] for clone in clones}) > 1
    assert len({clone["hostname"] for clone in clones}) == 3
    for clone in clones:
        assert clone["machine_ids"] == []  # what the firmware says was saved with the template
        assert 0 < clone["monotonic"] < 600  # a template's boot and this pod's life
        assert abs(clone["boottime"] - clone["monotonic"]) < 1
        assert abs(clone["uptime"] - clone["boottime"]) < 1


def test_clones_that_run_at_once_differ_too(pods: Pods) -> None:
    with ThreadPoolExecutor(10) as pool:
        names = [pods.ctr.new_id() for _ in range(10)]
        with ExitStack() as running:
            argvs = [pods.argv(name, ("sleep", "1000"), ("--detach",)) for name in names]
            for name in names:
                running.callback(pods.remove, name)
            started = list(pool.map(lambda argv: pods.ctr(*argv, timeout_s=300), argvs))
            assert [result.code for result in started] == [0] * 10, started
            assert {pods.state(name)["source"] for name in names} == {"restore"}
            script = "cat /proc/sys/kernel/random/boot_id; date +%s.%N"
            said = [pods.exec(name, "sh", "-c", script).ok().out.split() for name in names]
    assert len({boot_id for boot_id, _ in said}) == 10


def test_nothing_of_one_pod_is_found_by_the_next(one: Templates) -> None:
    pods = one.pods
    key = one.store.keys()[0]
    before = digests(one.store, key)
    marker = f"secret-of-{os.urandom(8).hex()}"
    script = f"for place in {' '.join(PLACES)}; do echo $0 > $place/left; done; exec python3 -c '{HOLD}' $0"
    look = "grep -rls --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr -e $0 / | sort"
    name = pods.ctr.new_id()
    with pods.start("sh", "-c", script, marker, name=name) as running:
        running.read_until(b"held\n", 60)
        assert pods.state(name)["source"] == "restore"
        left = pods.exec(name, "sh", "-c", look, marker).ok().out.split()
        assert left == [f"{place}/left" for place in PLACES]
        assert pods.run("sh", "-c", look, marker).ok().out == ""  # while the first one runs
        running.write(b"\n")
        assert running.finish(30).code == 0
    assert pods.run("sh", "-c", look, marker).ok().out == ""  # and after it
    assert digests(one.store, key) == before


def test_a_restored_pod_holds_nothing_of_the_template_open(one: Templates) -> None:
    with one.pods.detached("sleep", "1000") as name:
        assert one.pods.state(name)["source"] == "restore"
        for pid in one.instance.descendants():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
                assert str(one.store.root) not in Path(f"/proc/{pid}/maps").read_text(), comm(pid)
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    with suppress(FileNotFoundError):  # closed while we looked
                        assert str(one.store.root) not in os.readlink(f"/proc/{pid}/fd/{fd}"), comm(pid)
        # An operator may remove it.
        removed = casemate(one.instance, "template", "rm", *one.store.keys())
        assert removed.returncode == 0, removed.stderr
        assert one.pods.exec(name, "sh", "-c", "cat /bin/* > /dev/null; echo fine").ok().out == "fine\n"
        assert one.source() == "boot"


def test_a_restored_pod_can_be_paused_and_has_a_terminal_and_volumes(one: Templates) -> None:
    pods, volume = one.pods, one.instance.work / "volume"
    volume.mkdir()
    with pods.terminal("sh", "-c", "read word; echo got=$word", columns=91, rows=17) as terminal:
        terminal.write(b"this\n")
        terminal.expect(rb"got=this", 60)
        assert terminal.finish(20)[0] == 0
    mount = ("--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw")
    with pods.detached("sleep", "1000", options=mount) as name:
        assert pods.state(name)["source"] == "restore"
        pods.ctr("task", "pause", name).ok()
        pods.ctr("task", "resume", name).ok()
        pods.exec(name, "sh", "-c", "cat > /volume/file", stdin=b"x" * 3_000_000).ok()
    assert (volume / "file").read_bytes() == b"x" * 3_000_000


# -- damage --------------------------------------------------------------------------------------------------


def believe(store: TemplateStore, key: str) -> None:
    """Has the host remember that it has verified the files as they are now."""
    with template._opened(store.root / key) as files:
        store._remember(key, template._stamp(files))


def cut_ram(directory: Path) -> None:
    os.truncate(directory / RAM, (directory / RAM).stat().st_size // 2)


def empty_ram(directory: Path) -> None:
    size = (directory / RAM).stat().st_size
    os.truncate(directory / RAM, 0)
    os.truncate(directory / RAM, size)


def flip_state(directory: Path) -> None:
    with open(directory / STATE, "r+b") as state:
        first = state.read(1)[0]
        state.seek(0)
        state.write(bytes([first ^ 1]))


def cut_state(directory: Path) -> None:
    os.truncate(directory / STATE, (directory / STATE).stat().st_size // 2)


def lose_state(directory: Path) -> None:
    (directory / STATE).unlink()


def other_version(directory: Path) -> None:
    document = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(document | {"format": 0}))


@pytest.mark.parametrize(
    ("damage", "believed"),
    [
        pytest.param(cut_ram, False, id="ram cut"),
        pytest.param(flip_state, False, id="state flipped"),
        pytest.param(lose_state, False, id="state lost"),
        pytest.param(other_version, False, id="manifest of another version"),
        pytest.param(cut_ram, True, id="ram cut, believed"),
        pytest.param(empty_ram, True, id="ram empty, believed"),
        pytest.param(flip_state, True, id="state flipped, believed"),
        pytest.param(cut_state, True, id="state cut, believed"),
    ],
)
def test_damage_costs_a_boot_and_a_line_and_the_template(
    one: Templates, damage: Callable[[Path], None], believed: bool
) -> None:
    """believed: the host takes the files for verified, so that it is QEMU or the guest that has to notice."""
    (key,) = one.store.keys()
    damage(one.store.root / key)
    if believed:
        believe(one.store, key)
    with one.pods.detached("sleep", "1000") as name:
        assert one.pods.state(name)["source"] == "boot"
        assert one.pods.exec(name, "echo", "works").ok().out == "works\n"
        log = (one.pods.paths(name).directory / "shim.log").read_text().splitlines()
    assert len([line for line in log if BOOTED in line]) == 1, log
    assert not any("Traceback" in line for line in log), log
    assert one.store.keys() == ()
    assert one.staged() == []


# -- making --------------------------------------------------------------------------------------------------


@pytest.fixture
def node(pods: Pods) -> Iterator[Node]:
    node = Node(pods.ctr.instance)
    yield node
    node.close()


def test_the_first_pods_are_booted_and_the_next_ones_restored(nothing: Templates, node: Node) -> None:
    """Two first ones at once: each wants the template, it is made once, whatever becomes of casemated, which
    has forked the shims that have it made."""
    nothing.configure('allowed_annotations = ["dev.casemate.vcpus"]\n', make=True)
    node.start()
    with ThreadPoolExecutor(2) as pool:
        sources = pool.map(lambda _: nothing.source(), range(2))
        maker_of(nothing)  # it may have ended when both of them have
        node.kill()
        assert list(sources) == ["boot", "boot"]
    (key,) = nothing.wait_made()
    assert nothing.source() == "restore"
    assert nothing.source() == "restore"
    assert nothing.store.keys() == (key,)
    assert nothing.source("--annotation", "dev.casemate.vcpus=2") == "boot"  # another shape
    nothing.wait_made(2)
    assert nothing.source("--annotation", "dev.casemate.vcpus=2") == "restore"
    assert nothing.staged() == []


def maker_of(templates: Templates) -> int:
    """The first process of the maker that is at work, once it saves."""
    deadline = time.monotonic() + MADE_S
    while time.monotonic() < deadline:
        for journal in templates.instance.path("/run/casemate/pods").glob("*/journal.jsonl"):
            for entry in read_journal(journal):
                if entry.kind is Kind.PROCESS and comm(int(entry.value)) == "casemate-maker":
                    saving = any((templates.store.root / "tmp").glob("*/state"))
                    if saving:
                        return int(entry.value)
        time.sleep(0.02)
    raise AssertionError(f"no maker within {MADE_S} s")


def test_a_maker_that_is_killed_leaves_nothing_and_the_next_pod_has_another_one(nothing: Templates) -> None:
    nothing.configure(make=True)
    with ThreadPoolExecutor(1) as pool:
        source = pool.submit(nothing.source)
        kill_and_wait(maker_of(nothing))  # it may have ended when the pod has
        assert source.result() == "boot"
    assert nothing.store.keys() == ()
    collected = casemate(nothing.instance, "gc", "--json")
    assert collected.returncode == 0, collected.stderr
    assert len(json.loads(collected.stdout)["cleaned"]) == 1
    assert nothing.staged() == []
    assert nothing.source() == "boot"
    nothing.wait_made()
    assert nothing.source() == "restore"


def test_a_template_that_cannot_be_made_is_not_tried_by_every_pod(nothing: Templates) -> None:
    """Its directory is a file's: nothing can be made in it."""
    shutil.rmtree(nothing.store.root)
    nothing.store.root.mkdir(mode=0o755)
    full = nothing.store.root / "tmp"
    full.mkdir()
    subprocess.run(
        nothing.instance.inside("mount", "-t", "tmpfs", "-o", "size=1m", "tmp", str(full)), check=True
    )
    try:
        done = casemate(nothing.instance, "template", "build")
        assert done.returncode == 1
        assert "No space left on device" in done.stderr
        nothing.configure(make=True)
        with nothing.pods.detached("true") as name:
            log = (nothing.pods.paths(name).directory / "shim.log").read_text()
        assert "it failed lately" in log
    finally:
        subprocess.run(nothing.instance.inside("umount", str(full)), check=True)


def test_what_pods_may_be_restored_from_is_the_profiles_affair(one: Templates) -> None:
    assert one.source() == "restore"
    one.configure('[profiles.default]\ntemplate = "off"\n')
    assert one.source() == "boot"
    # A template of its own for each namespace: what is there for others is not for us.
    one.configure('[profiles.default]\ntemplate = "tenant"\n')
    one.build("--tenant", f"not-{one.pods.ctr.namespace}")
    assert one.source() == "boot"
    one.build("--tenant", one.pods.ctr.namespace)
    assert one.source() == "restore"
    assert len(one.store.keys()) == 3


def test_a_qemu_that_was_replaced_is_another_one(nothing: Templates) -> None:
    text = '#!/bin/sh\nexec /usr/bin/qemu-system-x86_64 "$@"\n'
    qemu = script(nothing.instance, "qemu-here", text)
    nothing.configure(f'qemu = "{qemu}"\n')
    (key,) = nothing.build()
    assert nothing.source() == "restore"
    os.utime(qemu)
    assert nothing.source() == "boot"
    collected = casemate(nothing.instance, "gc", "--json")
    assert json.loads(collected.stdout)["templates"] == [key]
    assert nothing.store.keys() == ()
