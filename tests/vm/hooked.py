"""Containers with hooks: a shim that adds them to config.json, and hooks that say what they saw.

What they should have seen is the tests' business.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from bench.instance import Instance
from tests.vm.faults import inside, script

PLUGINS = "/usr/lib/cni"
BRIDGE = "hooked0"
HOST_KINDS = ("prestart", "createRuntime", "poststart", "poststop")

WRAPPER = """\
#!{python} -IS
import json, os, sys
if sys.argv[-1] == "start":
    with open("config.json") as file:
        config = json.load(file)
    with open({given!r}) as file:
        given = json.load(file)
    config["hooks"] = given["hooks"]
    config["annotations"] = {{**(config.get("annotations") or {{}}), **given["annotations"]}}
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


CNI = """\
#!{python} -IS
import json, os, subprocess, sys
state = json.load(sys.stdin)
os.environ.update(
    CNI_COMMAND=sys.argv[1], CNI_CONTAINERID=state["id"], CNI_IFNAME="eth0", CNI_PATH={plugins!r},
    CNI_NETNS=f"/proc/{{state['pid']}}/ns/net" if "pid" in state else "",
)
sys.exit(subprocess.run([{plugins!r} + "/bridge"], input={conf!r}.encode()).returncode)
"""
"""A hook that calls CNI's plug-in as libcni does."""


class Hooked:
    """A runtime whose containers all have these hooks, until others are set."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.log = instance.work / "hooks.log"
        self.log.unlink(missing_ok=True)
        python = os.path.realpath(sys.executable)
        shim = str(instance.base / "bin" / "containerd-shim-casemate-v2")
        self._annotations = {"org.example.given": "by the client"}
        self._leases = instance.work / "leases"
        self._given = instance.work / "given.json"
        program = instance.base / "bin" / "containerd-shim-hooked-v2"
        program.write_text(WRAPPER.format(python=python, given=str(self._given), shim=shim))
        program.chmod(0o755)
        self.runtime = "io.containerd.hooked.v2"
        self.witness = script(instance, "witness", WITNESS.format(python=python, log=str(self.log)))
        self.set({kind: [self.tells(kind)] for kind in HOST_KINDS})

    def set(self, hooks: dict[str, list[dict[str, Any]]]) -> None:
        self._hooks = hooks
        self._write()

    @property
    def annotations(self) -> dict[str, str]:
        """That its containers have besides what ctr gives them."""
        return self._annotations

    @annotations.setter
    def annotations(self, annotations: dict[str, str]) -> None:
        self._annotations = annotations
        self._write()

    def _write(self) -> None:
        self._given.write_text(json.dumps({"hooks": self._hooks, "annotations": self._annotations}))

    def tells(self, kind: str, *more: str) -> dict[str, Any]:
        """A hook that goes well and says what it saw."""
        return {"path": self.witness, "args": ["witness", kind, *more], "env": [f"KIND={kind}", "LC_ALL=C"]}

    def shell(self, text: str, **more: object) -> dict[str, Any]:
        return {
            "path": "/bin/sh",
            "args": ["sh", "-c", text],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        } | more

    @contextlib.contextmanager
    def bridge(self, subnet: str) -> Iterator[None]:
        """Hooks that connect a container to a bridge of the host's, and disconnect it, as nerdctl's do."""
        conf = {
            "cniVersion": "0.4.0",
            "name": "hooked",
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "dataDir": str(self._leases),
                "ranges": [[{"subnet": subnet}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        cni = script(
            self.instance,
            "cni",
            CNI.format(python=os.path.realpath(sys.executable), conf=json.dumps(conf), plugins=PLUGINS),
        )
        self.set(
            {
                kind: [
                    {"path": cni, "args": ["cni", command], "env": ["PATH=/usr/sbin:/usr/bin"]},
                    self.tells(kind),
                ]
                for kind, command in (("createRuntime", "ADD"), ("poststop", "DEL"))
            }
        )
        try:
            yield
        finally:
            inside(self.instance, "ip", "link", "delete", BRIDGE)

    def leases(self) -> list[str]:
        """The addresses that are given to somebody."""
        return [path.name for path in (self._leases / "hooked").iterdir() if path.name[0].isdigit()]

    def seen(self) -> list[dict[str, Any]]:
        """What the hooks wrote down so far, in their order."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait(self, kind: str, timeout_s: float = 60.0) -> None:
        """Until such a hook wrote something down. Hooks announce nothing: hence a bounded poll."""
        deadline = time.monotonic() + timeout_s
        while kind not in self.kinds():
            if time.monotonic() > deadline:
                raise AssertionError(f"no {kind} hook within {timeout_s} s: {self.kinds()}")
            time.sleep(0.05)

    def kinds(self) -> list[str]:
        return [entry["kind"] for entry in self.seen()]
