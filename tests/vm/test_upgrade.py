"""Pods that run while a newer casemate is installed: they go on with the code that they were begun with, and
with its guest image.
"""

import compileall
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.instance import CHECKOUT, EXECUTABLES, launcher
from images import builder
from images.image import GuestImage
from images.kernel import KernelKind
from images.store import ImageStore
from rpc.api import agent as api
from scripts.product import PACKAGES
from tests.vm import faults
from tests.vm.node import Node
from tests.vm.operator import casemate
from tests.vm.pods import Pods
from tests.vm.test_forkserver import CONTAINERD, forked_by

MARK = """
import logging
logging.getLogger("casemate").warning("of the next version")
"""


@pytest.fixture
def store(pods: Pods, image: GuestImage) -> Iterator[ImageStore]:
    """What images there are: that of this version, so far. Pods are booted."""
    home = pods.ctr.instance.work / pods.ctr.new_id("store")  # where QEMU's users get to
    store = ImageStore(home / "images")
    files = {name: image.directory / name for name in image.manifest["files"]}
    store.add("default", files, {name: image.manifest[name] for name in image.manifest if name != "files"})
    pods.ctr.instance.configure(f'image_dir = "{store.root}"\ntemplate_dir = "{home}/templates"\n')
    yield store
    shutil.rmtree(home)


@pytest.fixture
def upgraded(pods: Pods, tmp_path: Path) -> Iterator[Path]:
    """A newer version, as `make install` puts it beside the other; the launchers name it by turns. Its shim
    and its agent speak otherwise with each other."""
    code = tmp_path / "code"
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / package, code / package, ignore=ignored)
    with open(code / "shim/creation.py", "a") as file:
        file.write(MARK)
    module = code / "rpc/api/agent.py"
    module.write_text(re.sub(r"(?m)^PROTOCOL = .*$", f"PROTOCOL = {api.PROTOCOL + 1}", module.read_text()))
    compileall.compile_dir(code, quiet=1)  # as `make install`: containerd gives a `delete` five seconds
    yield code
    install(pods, CHECKOUT)


@pytest.fixture
def node(pods: Pods) -> Iterator[Node]:
    node = Node(pods.ctr.instance)
    yield node
    node.close()


def install(pods: Pods, code: Path) -> None:
    """Whoever starts an executable finds it whole, of one version or the other."""
    for name, module in EXECUTABLES.items():
        executable = pods.ctr.instance.base / "bin" / name
        scratch = executable.with_suffix(".new")
        scratch.write_text(launcher(code, module))
        scratch.chmod(0o755)
        scratch.rename(executable)


def is_next(pods: Pods, name: str) -> bool:
    return "of the next version" in pods.paths(name).log.read_text()


def collected(pods: Pods) -> dict[str, list[str]]:
    """The digests that `casemate image gc` removed, and those it left, as they are in use."""
    done = casemate(pods.ctr.instance, "image", "gc", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


ECHO = "trap 'exit 7' TERM; while read line; do echo got $line; done"


def test_a_pod_goes_on_while_another_version_and_image_are_installed(
    pods: Pods, store: ImageStore, upgraded: Path, node: Node
) -> None:
    node.start()
    before = store.resolve("default")
    with pods.detached("bash", "-c", ECHO) as old:
        kernel = KernelKind(before.manifest["kernel_kind"])
        after = builder.build(store, builder.Options(kernel=kernel, source=upgraded)).image
        install(pods, upgraded)
        assert collected(pods) == {"removed": [], "in_use": [before.digest]}
        with pods.detached("sleep", "1000") as new:
            pods.ctr.instance.restart()
            assert (is_next(pods, old), is_next(pods, new)) == (False, True)
            # casemated is not the `start` of another version.
            assert forked_by(pods, new) == CONTAINERD
            digests = [pods.state(name)["image_digest"] for name in (old, new)]
            assert digests == [before.digest, after.digest]
            for name in (old, new):
                assert pods.exec(name, "cat", stdin=b"answers").ok().out == "answers"
                pods.ctr("task", "pause", name).ok()
                pods.ctr("task", "resume", name).ok()
                assert "memory.usage" in pods.ctr("task", "metrics", name).ok().out
        with pods.ctr.start("task", "attach", old) as running:
            running.write(b"something\n")
            running.read_until(b"got something\n", 30)
            pods.kill(old, "TERM").ok()
            assert running.finish(30).code == 7
    assert collected(pods) == {"removed": [before.digest], "in_use": []}
    node.close()
    node.start()
    with pods.detached("sleep", "1000") as name:
        # The next version's, or its guest's agent would not have spoken with it.
        assert pods.state(name)["image_digest"] == after.digest
        install(pods, CHECKOUT)
        # What it leaves, another version's `delete` takes away.
        faults.kill_and_wait(pods.state(name)["pid"])
