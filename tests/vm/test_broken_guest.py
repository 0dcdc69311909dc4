"""Guests that panic, fall silent or die: the reason, the console's last words, and nothing left behind."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from images import builder
from images.store import ImageStore
from shim.vm.crowding import MOST
from tests.vm import faults
from tests.vm.faults import refused
from tests.vm.operator import casemate
from tests.vm.pods import Pods

BOOT_S = 60.0
TCG_FACTOR = 4
CALL_S = 0.5
CONFIG = """
image_dir = "{store}"
[timeouts]
agent_call_s = {call_s}
tcg_factor = {factor}
boot_s = {boot_s}
[profiles.default]
image = "broken"
kernel_cmdline = "{cmdline}"
"""


@pytest.fixture(scope="module")
def broken_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with a guest image, made by the image builder, whose agent misbehaves on demand."""
    source = tmp_path_factory.mktemp("source")
    checkout = builder.Options().source
    for package in ("agent", "rpc"):
        shutil.copytree(checkout / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "agent/__main__.py").rename(source / "agent/real.py")
    shutil.copyfile(Path(__file__).with_name("broken_agent.py"), source / "agent/__main__.py")
    # not below pytest's own directory, which is closed to the user that QEMU runs as
    with tempfile.TemporaryDirectory(prefix="casemate-broken-", dir="/var/tmp") as directory:
        os.chmod(directory, 0o711)
        store = ImageStore(Path(directory) / "images")
        builder.build(store, builder.Options(name="broken", source=source))
        yield store.root


def configure(
    pods: Pods, store: Path, cmdline: str, boot_s: float = BOOT_S, call_s: float = CALL_S, more: str = ""
) -> None:
    config = CONFIG.format(store=store, call_s=call_s, factor=TCG_FACTOR, boot_s=boot_s, cmdline=cmdline)
    pods.ctr.instance.configure(more + config)


def test_the_broken_image_is_whole_unless_told_otherwise(pods: Pods, broken_store: Path) -> None:
    configure(pods, broken_store, "")
    assert pods.run("sh", "-c", "exit 6").code == 6


def test_a_kernel_that_finds_no_root(pods: Pods, broken_store: Path) -> None:
    configure(pods, broken_store, "rdinit=/no/such/init")
    refused(pods.run("true"), "kernel panicked", "Unable to mount root", within_s=BOOT_S)


def test_an_agent_that_ends_at_once(pods: Pods, broken_store: Path) -> None:
    configure(pods, broken_store, "broken=returns")
    refused(pods.run("true"), "kernel panicked", "Attempted to kill init", within_s=BOOT_S)


def test_an_agent_that_never_answers(pods: Pods, broken_store: Path) -> None:
    configure(pods, broken_store, "broken=mute", boot_s=2.0)
    limit_s = 2.0 * TCG_FACTOR * MOST + faults.AT_ONCE_S
    result = pods.run("true", timeout_s=2 * limit_s)
    refused(result, "agent did not answer", "console", "boot_s", within_s=limit_s)
    assert result.seconds >= 2.0


@pytest.mark.parametrize("method", ["mount_share", "create_container"])
def test_an_agent_that_answers_and_falls_silent(pods: Pods, broken_store: Path, method: str) -> None:
    configure(pods, broken_store, f"broken=silent:{method}")
    word = method.replace("_", "")
    result = pods.run("true")
    refused(result, "agent did not answer", "console", within_s=BOOT_S)
    assert word in result.err.lower().replace("_", "").replace(" ", ""), result


def test_an_agent_that_falls_silent_while_a_container_runs(pods: Pods, broken_store: Path) -> None:
    """Each call is answered with an error, on a crowded host a bit later; the pod can still be ended."""
    configure(pods, broken_store, "broken=silent:pause broken=silent:signal")
    with pods.detached("sleep", "1000") as name:
        result = pods.ctr("task", "pause", name)
        refused(result, "agent did not answer", within_s=CALL_S * TCG_FACTOR * MOST + faults.AT_ONCE_S)
        assert pods.exec(name, "echo", "still here").ok().out == "still here\n"
        pods.kill(name)  # nobody answers; removing it must do without


@pytest.mark.parametrize("method", ["hello", "mount_share", "create_container"])
def test_an_agent_that_dies(pods: Pods, broken_store: Path, method: str) -> None:
    configure(pods, broken_store, f"broken=dies:{method}")
    refused(pods.run("true"), "kernel panicked", "exitcode=0x00000300", within_s=BOOT_S)


def test_an_agent_that_dies_while_a_container_runs(pods: Pods, broken_store: Path) -> None:
    configure(pods, broken_store, "broken=dies:pause")
    name = pods.ctr.new_id()
    with pods.start("sh", "-c", "echo up; exec sleep 1000", name=name) as running:
        running.read_until(b"up\n", 60)
        refused(pods.ctr("task", "pause", name), "kernel panicked", within_s=faults.AT_ONCE_S)
        assert running.finish(30).code != 0
    assert "exitcode=0x00000300" in (pods.ended_directory(name) / "console.log").read_text()


@pytest.fixture
def broken(pods: Pods, broken_store: Path) -> Pods:
    """Its guests are restored, and misbehave as the environment of their container says."""
    configure(
        pods, broken_store, "", call_s=BOOT_S, more=f'template_dir = "{broken_store.parent}/templates"\n'
    )
    if not (broken_store.parent / "templates").exists():
        built = casemate(pods.ctr.instance, "template", "build")
        assert built.returncode == 0, built
    return pods


def as_env(behaviour: str) -> tuple[str, str]:
    return ("--env", f"BROKEN={behaviour}")


PANICKED = "exitcode=0x00000300"


def test_an_agent_that_dies_as_a_container_starts(broken: Pods) -> None:
    result = broken.run("true", options=as_env("dies:start_container"))
    refused(result, "kernel panicked", PANICKED, within_s=BOOT_S)


def test_an_agent_that_dies_as_its_output_is_read(broken: Pods) -> None:
    name = broken.ctr.new_id()
    assert broken.run("true", options=as_env("dies:read_output"), name=name).code != 0
    assert PANICKED in (broken.ended_directory(name) / "console.log").read_text()


@pytest.mark.parametrize("method", ["exec", "delete", "stats", "signal"])
def test_an_agent_that_dies_when_it_is_asked(broken: Pods, method: str) -> None:
    """delete: of an exec. What is asked fails, and the container's end is told."""
    name = broken.ctr.new_id()
    options = as_env(f"dies:{method}")
    with broken.start("sh", "-c", "echo up; exec sleep 1000", options=options, name=name) as running:
        running.read_until(b"up\n", 4 * BOOT_S)
        if method in ("exec", "delete"):
            asked = broken.exec(name, "true")
        elif method == "stats":
            asked = broken.ctr("task", "metrics", name)
        else:
            asked = broken.kill(name)
        if method == "stats":  # containerd says "no metrics received"
            assert asked.code != 0
        elif method != "delete":  # which its client is not told the failure of
            refused(asked, "kernel panicked", within_s=BOOT_S)
        assert running.finish(60).code == 137
    assert PANICKED in (broken.ended_directory(name) / "console.log").read_text()


def test_an_agent_that_dies_as_it_writes_back_changes_no_exit_status(broken: Pods) -> None:
    name = broken.ctr.new_id()
    assert broken.run("sh", "-c", "exit 6", options=as_env("dies:sync"), name=name).code == 6
    assert PANICKED in (broken.ended_directory(name) / "console.log").read_text()


@pytest.mark.parametrize("method", ["create_container", "start_container"])
def test_an_agent_whose_answers_are_no_messages(broken: Pods, method: str) -> None:
    refused(broken.run("true", options=as_env(f"garbles:{method}")), "malformed", within_s=BOOT_S)


def test_an_agent_that_says_too_much_is_cut_short(broken: Pods) -> None:
    result = broken.run("true", options=as_env("brags:create_container"))
    refused(result, "xxx", within_s=BOOT_S)
    assert b"\x1b" not in result.stderr


def test_an_agent_that_floods_its_shim_with_events(broken: Pods) -> None:
    result = broken.run("sh", "-c", "echo still here; exit 6", options=as_env("floods:start_container"))
    assert (result.code, result.out) == (6, "still here\n"), result


def test_an_agent_that_tells_of_ends_that_cannot_be(broken: Pods) -> None:
    """A status is a byte, and the end of a process is not told twice."""
    result = broken.run("sh", "-c", "exit 6", options=as_env("exaggerates:start_container"))
    assert result.code == 255, result


def test_an_agent_of_another_protocol(pods: Pods, broken_store: Path) -> None:
    configure(pods, broken_store, "broken=lies:hello")
    refused(pods.run("true"), "protocol", "casemate image build", within_s=BOOT_S)


@pytest.mark.client("ctr run --privileged", "differs", "in its own VM, without the host's devices")
def test_a_container_that_makes_its_guest_panic(pods: Pods) -> None:
    """Privileged in its own VM: it hurts nobody else, and its end is told."""
    name = pods.ctr.new_id()
    options = ("--privileged",)
    with pods.start(
        "sh", "-c", "echo up; read go; echo c > /proc/sysrq-trigger", options=options, name=name
    ) as running:
        running.read_until(b"up\n", 60)
        running.write(b"go\n")
        result = running.finish(30)
    assert result.code != 0
    assert "kernel panicked" in (pods.ended_directory(name) / "state.json").read_text()


def test_a_guest_that_powers_itself_off(pods: Pods) -> None:
    name = pods.ctr.new_id()
    options = ("--privileged", "--privileged-without-host-devices")
    with pods.start(
        "sh", "-c", "echo up; read go; echo o > /proc/sysrq-trigger; sleep 1000", options=options, name=name
    ) as running:
        running.read_until(b"up\n", 60)
        running.write(b"go\n")
        assert running.finish(30).code != 0


def test_shutting_down_is_bounded_when_the_guest_does_not(pods: Pods, broken_store: Path) -> None:
    configure(pods, broken_store, "broken=silent:sync broken=silent:shutdown broken=silent:delete")
    result = pods.run("true", timeout_s=2 * BOOT_S)
    assert result.seconds < BOOT_S, result
    assert not [pid for pid in pods.ctr.instance.descendants() if faults.comm(pid).startswith("qemu")]
