"""What a QEMU that was taken over by its guest can reach: its user's eyes and hands, in its namespaces."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from shim.vm.users import FIRST_UID, UIDS
from tests.vm.pods import Pods
from tests.vm.test_restore import Templates, nothing, one

__all__ = ("nothing", "one")

LOOK = """\
import json, os, socket, stat, sys
uid, own, *others = sys.argv[1:]
there = [(top, [os.path.join(top, name) for name in names]) for top, _, names in os.walk('/run')]
kinds = {}
for _, paths in there:
    for path in paths:
        try:
            kinds[path] = os.lstat(path).st_mode
        except FileNotFoundError:
            continue  # it went while we looked
os.setgroups([])
os.setresgid(*[int(uid)] * 3)
os.setresuid(*[int(uid)] * 3)

def can(what, *arguments):
    try:
        what(*arguments)
    except OSError:
        return False
    return True

def connect(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)

found = {'writable': [], 'readable': [], 'sockets': [], 'others': [], 'processes': []}
host = os.stat('/run').st_dev
for top, _ in there:
    if os.access(top, os.W_OK) and os.stat(top).st_dev == host:
        found['writable'].append(top)
for path, kind in kinds.items():
    if path.startswith(own):
        continue
    if stat.S_ISSOCK(kind) and can(connect, path):
        found['sockets'].append(path)
    if stat.S_ISREG(kind) and '/casemate/' in path and os.access(path, os.R_OK):
        found['readable'].append(path)
found['others'] = [path for path in others if can(os.stat, path)]
for pid in filter(str.isdigit, os.listdir('/proc')):
    try:
        owner = os.stat(f'/proc/{pid}').st_uid
    except FileNotFoundError:
        continue
    if owner != os.getuid() and can(os.kill, int(pid), 0):
        found['processes'].append(pid)
print(json.dumps(found))
"""
"""Lists as root what is below /run, and tries it as QEMU's user. own: the pod's directory. others: paths of
what is none of its business."""


def reached(pods: Pods, name: str, others: list[str]) -> dict[str, Any]:
    qemu, own = pods.state(name)["qemu_pid"], f"/run/casemate/pods/{pods.paths(name).key}/"
    uid = os.stat(f"/proc/{qemu}").st_uid
    assert FIRST_UID <= uid < FIRST_UID + UIDS
    within = ["nsenter", f"--target={qemu}", "--mount", "--pid", "--net", "--wdns=/", "--"]
    done = subprocess.run(
        [*within, str(Path(sys.executable).resolve()), "-IS", "-c", LOOK, str(uid), own, *others],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_qemu_that_was_taken_over_reaches_nothing_of_other_pods(one: Templates) -> None:
    """Of one that was restored and of one that was booted: files, sockets, processes, and the host's /run,
    which it must not be able to fill."""
    pods, (key,) = one.pods, one.store.keys()
    with pods.detached("sleep", "1000") as restored:
        one.configure('[profiles.default]\ntemplate = "off"\n')
        with pods.detached("sleep", "1000") as booted:
            assert [pods.state(name)["source"] for name in (restored, booted)] == ["restore", "boot"]
            directories = {name: f"/run/casemate/pods/{pods.paths(name).key}" for name in (restored, booted)}
            uids = [os.stat(f"/proc/{pods.state(name)['qemu_pid']}").st_uid for name in directories]
            assert uids[0] != uids[1]
            for name, other in ((restored, booted), (booted, restored)):
                files = [*(one.store.root / key).iterdir(), f"{directories[other]}/console.sock"]
                others = [directories[other], *map(str, files)]
                assert {what: found for what, found in reached(pods, name, others).items() if found} == {}
