"""Containers with hooks: a shim that adds them to config.json, and hooks that say what they saw.

What they should have seen is the tests' business.
"""

import json
import os
import sys
import time
from typing import Any

from bench.instance import Instance
from tests.vm.faults import script

HOST_KINDS = ("prestart", "createRuntime", "poststart", "poststop")

WRAPPER = """\
#!{python} -IS
import json, os, sys
if sys.argv[-1] == "start":
    with open("config.json") as file:
        config = json.load(file)
    with open({hooks!r}) as file:
        config["hooks"] = json.load(file)
    config.setdefault("annotations", {{}})["org.example.given"] = "by the client"
    with open("config.json", "w") as file:
        json.dump(config, file)
os.execv({shim!r}, [{shim!r}, *sys.argv[1:]])
"""

WITNESS = """\
#!{python} -IS
import json, os, sys
def net(path):
    try:
        return os.readlink(path)
    except OSError as error:
        return error.strerror
told = json.load(sys.stdin)
seen = {{
    "kind": sys.argv[1],
    "args": sys.argv[1:],
    "state": told,
    "env": dict(os.environ),
    "cwd": os.getcwd(),
    "self": int(os.readlink("/proc/self")) == os.getpid(),
    "namespaces": {{name: os.readlink(f"/proc/self/ns/{{name}}") for name in ("mnt", "net", "pid")}},
    "pod_net": net(f"/proc/{{told.get('pid')}}/ns/net"),
}}
with open({log!r}, "a") as file:
    file.write(json.dumps(seen) + "\\n")
"""
"""A hook that writes down what it was told, and what it sees."""


class Hooked:
    """A runtime whose containers all have these hooks, until others are set."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.log = instance.work / "hooks.log"
        self.log.unlink(missing_ok=True)
        python = os.path.realpath(sys.executable)
        shim = str(instance.base / "bin" / "containerd-shim-casemate-v2")
        self._hooks = instance.work / "hooks.json"
        program = instance.base / "bin" / "containerd-shim-hooked-v2"
        program.write_text(WRAPPER.format(python=python, hooks=str(self._hooks), shim=shim))
        program.chmod(0o755)
        self.runtime = "io.containerd.hooked.v2"
        self.witness = script(instance, "witness", WITNESS.format(python=python, log=str(self.log)))
        self.set({kind: [self.tells(kind)] for kind in HOST_KINDS})

    def set(self, hooks: dict[str, list[dict[str, Any]]]) -> None:
        self._hooks.write_text(json.dumps(hooks))

    def tells(self, kind: str, *more: str) -> dict[str, Any]:
        """A hook that goes well and says what it saw."""
        return {"path": self.witness, "args": ["witness", kind, *more], "env": [f"KIND={kind}", "LC_ALL=C"]}

    def shell(self, text: str, **more: object) -> dict[str, Any]:
        return {
            "path": "/bin/sh",
            "args": ["sh", "-c", text],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        } | more

    def seen(self) -> list[dict[str, Any]]:
        """What the hooks wrote down so far, in their order."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait(self, kind: str, timeout_s: float = 20.0) -> None:
        """Until such a hook wrote something down. Hooks announce nothing: hence a bounded poll."""
        deadline = time.monotonic() + timeout_s
        while kind not in self.kinds():
            if time.monotonic() > deadline:
                raise AssertionError(f"no {kind} hook within {timeout_s} s: {self.kinds()}")
            time.sleep(0.05)

    def kinds(self) -> list[str]:
        return [entry["kind"] for entry in self.seen()]
