"""What the agent does in crun's place is what the crun of this very guest image would have done."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from rpc.errors import CasemateError, FailedPrecondition, NotFound
from tests.vm.agentvm import AgentVM, process, spec

STATE = "/run/casemate/crun"
CRUN = ("/usr/bin/crun", "--root", STATE)
# What a container has of the guest's, to run the image's own crun where busybox is at home.
SEEN = {path: path for path in ("/usr", "/run/casemate", "/sys")} | {
    "/lib": "/usr/lib",
    "/lib64": "/usr/lib64",
}


@pytest.fixture(scope="module")
def watcher(vm: AgentVM) -> Iterator[str]:
    """A container that has the guest's own files and processes, to look at the agent's work with."""
    what = spec("sleep", "1000")
    del what["hostname"]
    what["linux"]["namespaces"] = [{"type": "mount"}]
    for there, here in SEEN.items():
        what["mounts"].append({"destination": there, "type": "bind", "source": here, "options": ["rbind"]})

    async def begin() -> None:
        await vm.create("watcher", what)
        await vm.start("watcher")

    vm.run(begin())
    yield "watcher"
    vm.run(vm.finish("watcher"))


class Watcher:
    def __init__(self, vm: AgentVM, name: str) -> None:
        self._vm, self._name, self._count = vm, name, 0

    async def __call__(self, *args: str) -> tuple[int, str]:
        self._count += 1
        status, out = await self._vm.exec_once(self._name, f"look{self._count}", process(*args))
        return status, out.decode()

    async def status(self, name: str) -> str:
        """What crun itself says that a container is."""
        code, out = await self(*CRUN, "state", name)
        assert code == 0, f"crun state {name}: {code}"
        return str(json.loads(out)["status"])

    async def commands(self, name: str) -> set[str]:
        """Those of crun's that were run for a container: each has left its log."""
        _, out = await self("ls", f"/run/casemate/containers/{name}")
        return {word.removesuffix(".log") for word in out.split() if word.endswith(".log")}


@pytest.fixture
def look(vm: AgentVM, watcher: str) -> Watcher:
    return Watcher(vm, watcher)


def test_start_and_delete_without_crun_are_what_crun_takes_for_them(vm: AgentVM, look: Watcher) -> None:
    async def scenario() -> None:
        await vm.create("plain", spec("sleep", "1000"))
        assert await look.status("plain") == "created"
        await vm.start("plain")
        assert await look.status("plain") == "running"
        assert await look.commands("plain") == {"init"}
        await vm.signal("plain", 9)
        await vm.exit_of("plain")
        assert await look.status("plain") == "stopped"
        await vm.delete("plain")
        assert (await look("ls", f"{STATE}/plain"))[0] == 1
        assert (await look("ls", "/sys/fs/cgroup/containers/plain"))[0] == 1
        assert (await look(*CRUN, "state", "plain"))[0] == 1

    vm.run(scenario())


def test_hooks_of_start_and_delete_are_run(vm: AgentVM, look: Watcher) -> None:
    """The shim lets none of these through, and has the host run them; should it ever, crun is asked."""

    def hook(word: str) -> list[dict[str, Any]]:
        return [{"path": "/usr/bin/busybox", "args": ["touch", f"/run/casemate/{word}"]}]

    async def scenario() -> None:
        hooks = {"poststart": hook("poststart"), "poststop": hook("poststop")}
        await vm.create("hooked", spec("sleep", "1000") | {"hooks": hooks})
        assert (await look("ls", "/run/casemate/poststart"))[0] == 1
        await vm.start("hooked")
        assert await look("ls", "/run/casemate/poststart") == (0, "/run/casemate/poststart\n")
        await vm.finish("hooked")
        assert await look("ls", "/run/casemate/poststop") == (0, "/run/casemate/poststop\n")
        assert (await look("ls", f"{STATE}/hooked"))[0] == 1

    vm.run(scenario())


def test_hooks_of_the_guest_are_run_at_their_moments_and_told_the_state(vm: AgentVM, look: Watcher) -> None:
    def hook(program: str, path: str) -> list[dict[str, Any]]:
        words = f"read state; echo $KIND $state >{path}"
        return [{"path": program, "args": ["sh", "-c", words], "env": ["KIND=its-own"], "timeout": 20}]

    async def scenario() -> None:
        hooks = {
            "createContainer": hook("/bin/sh", "/run/casemate/made"),
            "startContainer": hook("/bin/sh", "/started"),
        }
        await vm.create("hooked", spec("sleep", "1000") | {"hooks": hooks})
        code, made = await look("cat", "/run/casemate/made")
        assert code == 0
        assert made.startswith("its-own ")
        assert json.loads(made.partition(" ")[2])["id"] == "hooked"
        _, pid = await look("sh", "-c", f"cat {STATE}/hooked/status")
        root = f"/proc/{json.loads(pid)['pid']}/root"
        assert (await look("ls", f"{root}/started"))[0] == 1
        await vm.start("hooked")
        # The program is not waited for, and its hooks are run before it.
        until = f"for i in $(seq 300); do [ -s {root}/started ] && break; sleep 0.1; done; cat {root}/started"
        code, started = await look("sh", "-c", until)
        assert code == 0
        assert json.loads(started.partition(" ")[2])["id"] == "hooked"
        await vm.finish("hooked")

    vm.run(scenario())


@pytest.mark.parametrize(
    ("hooks", "error", "words"),
    [
        (
            {"createContainer": [{"path": "/usr/bin/nvidia-ctk"}]},
            NotFound,
            r"createContainer hook /usr/bin/nvidia-ctk in the guest image: .*no such file",
        ),
        (
            {"startContainer": [{"path": "/no/such/program"}]},
            NotFound,
            r"startContainer hook /no/such/program in the container's root: .*no such file",
        ),
        (
            {"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "echo the moon >&2; exit 3"]}]},
            CasemateError,
            r"crun create failed.*the moon",
        ),
        (
            {"createContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "sleep 1000"], "timeout": 1}]},
            CasemateError,
            r"crun create failed",
        ),
    ],
)
def test_a_hook_of_the_guest_that_fails_fails_the_container(
    vm: AgentVM, look: Watcher, hooks: dict[str, Any], error: type[Exception], words: str
) -> None:
    async def scenario() -> None:
        with pytest.raises(error, match=words):
            await vm.create("hooked", spec("sleep", "1000") | {"hooks": hooks})
        assert (await look("ls", f"{STATE}/hooked"))[0] == 1
        assert (await look("ls", "/sys/fs/cgroup/containers/hooked"))[0] == 1

    vm.run(scenario())


def test_a_start_container_hook_that_fails_ends_the_container(vm: AgentVM) -> None:
    async def scenario() -> None:
        fails = {"path": "/bin/sh", "args": ["sh", "-c", "echo the sun >&2; exit 3"]}
        await vm.create("hooked", spec("sleep", "1000") | {"hooks": {"startContainer": [fails]}})
        await vm.start("hooked")  # as with crun on a host, whose `start` waits for no such hook
        assert await vm.exit_of("hooked") == 1
        await vm.delete("hooked")

    vm.run(scenario())


def test_without_the_fifo_crun_is_asked_to_start(vm: AgentVM, look: Watcher) -> None:
    async def scenario() -> None:
        await vm.create("other", spec("sleep", "1000"))
        assert (await look("rm", f"{STATE}/other/exec.fifo"))[0] == 0
        with pytest.raises(Exception, match=r"crun start failed.*exec\.fifo"):
            await vm.start("other")
        assert await vm.finish("other") == 137

    vm.run(scenario())


def test_a_container_whose_init_died_is_not_started(vm: AgentVM, look: Watcher) -> None:
    """Of the two moments at which that can be seen, this is the later: nobody has the FIFO open."""

    async def scenario() -> None:
        pid = await vm.create("dead", spec("sleep", "1000"))
        # Dead, be it that nobody has asked for its status yet: its descriptors are closed.
        gone = f"[ ! -e /proc/{pid} ] || grep -q '^State:.Z' /proc/{pid}/status"
        until = f"kill -9 {pid}; for i in $(seq 300); do {gone} && exit 0; sleep 0.1; done; exit 1"
        assert (await look("sh", "-c", until))[0] == 0
        with pytest.raises(FailedPrecondition, match="stopped"):
            await vm.start("dead")
        assert await vm.exit_of("dead") == 137
        await vm.delete("dead")

    vm.run(scenario())


def test_a_cgroup_that_the_container_made_below_its_own_goes_with_it(vm: AgentVM, look: Watcher) -> None:
    async def scenario() -> None:
        await vm.create("parent", spec("sleep", "1000"))
        await vm.start("parent")
        assert (await look("mkdir", "-p", "/sys/fs/cgroup/containers/parent/a/b"))[0] == 0
        assert await vm.finish("parent") == 137
        assert (await look("ls", "/sys/fs/cgroup/containers/parent"))[0] == 1
        assert (await look("ls", f"{STATE}/parent"))[0] == 1

    vm.run(scenario())
