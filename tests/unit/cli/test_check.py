"""`casemate check`: each check on a small real host: trees of files, programs that answer, a gRPC peer."""

import json
import os
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cli.checks import containerd, programs, store
from cli.checks import host as host_checks
from cli.checks.result import Check, CheckContext, Level, Result
from config import load
from config.sources import read_defaults
from images.store import ImageStore
from tests.unit.cli.conftest import ROOT, Casemate
from tests.unit.ticks import next_tick

SETTINGS = read_defaults().settings


def one(check: Check, context: CheckContext) -> Result:
    (result,) = check(context)
    return result


@pytest.fixture
def context(host: Path) -> CheckContext:
    """A host with nothing in it."""
    return CheckContext(SETTINGS, str(host / "containerd.sock"), host / "root")


def put(context: CheckContext, path: str, text: str = "") -> Path:
    target = context.path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# --- the command ---


def test_every_line_is_ok_or_has_a_fix(casemate: Casemate) -> None:
    answer = json.loads(casemate("check", "--json").stdout)
    levels = {row["level"] for row in answer["results"]}
    assert levels <= {"ok", "warning", "failure"}
    for row in answer["results"]:
        assert row["found"]
        assert row["level"] == "ok" or row["fix"], row
    names = " ".join(row["name"] for row in answer["results"])
    for area in (
        "config",
        "acceleration",
        "QEMU",
        "libvirt",
        "virtiofsd",
        "firmware",
        "image default",
        "containerd",
        "vsock",
        "vhost-net",
        "/dev/net/tun",
        "cgroups",
        "IOMMU",
        "hugepages",
        "dedicated CPUs",
    ):
        assert area in names


def test_exit_code_is_1_for_failures_only(casemate: Casemate, monkeypatch: pytest.MonkeyPatch) -> None:
    def fine(context: CheckContext) -> Iterator[Result]:
        yield Result("a", Level.OK, "good")
        yield Result("b", Level.WARNING, "so so", "do this")

    def bad(context: CheckContext) -> Iterator[Result]:
        yield Result("c", Level.FAILURE, "broken", "do that")

    monkeypatch.setattr("cli.check._checks", lambda: (fine,))
    result = casemate("check")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "ok      config: valid",
        "ok      a: good",
        "warning b: so so",
        "        fix: do this",
        "this host is fit: 0 failures, 1 warnings",
    ]
    monkeypatch.setattr("cli.check._checks", lambda: (fine, bad))
    result = casemate("check")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-3:] == [
        "failure c: broken",
        "        fix: do that",
        "this host is not fit: 1 failures, 1 warnings",
    ]
    assert json.loads(casemate("check", "--json").stdout)["fit"] is False


def test_a_wrong_config_is_a_failure_and_the_host_is_still_checked(casemate: Casemate, host: Path) -> None:
    (host / "etc/config.toml").write_text("acel = 1\n")
    answer = json.loads(casemate("check", "--json").stdout)
    first, *others = answer["results"]
    assert (first["name"], first["level"], first["fix"]) == ("config", "failure", "did you mean accel?")
    assert "config.toml:1: unknown key acel" in first["found"]
    assert len(others) > 10


def test_a_config_that_others_may_write_is_a_warning(casemate: Casemate, host: Path) -> None:
    path = host / "etc/config.toml"
    path.write_text("")
    path.chmod(0o664)
    first, *_ = json.loads(casemate("check", "--json").stdout)["results"]
    assert (first["level"], first["fix"]) == ("warning", f"chmod go-w {path}")


def test_settings_that_cannot_be_cached_are_a_warning(
    casemate: Casemate, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "RACY_NS", 0)
    (host / "run").mkdir()
    (host / "run/cache").write_text("in the way")
    results = json.loads(casemate("check", "--json").stdout)["results"]
    (cache,) = [row for row in results if row["name"] == "config cache"]
    assert cache["level"] == "warning"
    assert "not cached" in cache["found"]


def test_what_cannot_be_looked_at_is_a_failure_not_a_crash(
    casemate: Casemate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_tree(context: CheckContext) -> Iterator[Result]:
        (context.root / "proc/nonsense").read_text()
        yield Result("never", Level.OK, "")

    monkeypatch.setattr("cli.check._checks", lambda: (broken_tree,))
    result = casemate("check")
    assert result.exit_code == 1
    assert "failure broken tree: cannot be checked: " in result.stdout


# --- the machine ---


def test_acceleration_says_what_the_probe_found(context: CheckContext) -> None:
    from shim.vm.accel import probe

    found = probe()
    result = one(host_checks.acceleration, context)
    assert found.reason in result.found
    assert result.level is (Level.OK if found.kind == "kvm" else Level.WARNING)


def test_acceleration_that_is_demanded_and_absent_is_a_failure(context: CheckContext) -> None:
    from shim.vm.accel import probe

    if probe().kind == "kvm":
        pytest.skip("this machine has KVM")
    demanded = CheckContext(SETTINGS.replace(accel="kvm"), "", context.root)
    assert one(host_checks.acceleration, demanded).level is Level.FAILURE


@pytest.mark.parametrize(
    ("check", "path"),
    [
        (host_checks.vsock, "/dev/vhost-vsock"),
        (host_checks.vhost_net, "/dev/vhost-net"),
        (host_checks.tun, "/dev/net/tun"),
    ],
)
def test_a_missing_device_is_a_warning_with_its_module(
    context: CheckContext, check: Check, path: str
) -> None:
    missing = one(check, context)
    assert missing.level is Level.WARNING
    assert (missing.fix or "").startswith("modprobe ")
    put(context, path)
    assert one(check, context).level is Level.OK


def test_vsock_that_the_config_demands_is_a_failure(context: CheckContext) -> None:
    demanded = CheckContext(SETTINGS.replace(transport="vsock"), "", context.root)
    assert one(host_checks.vsock, demanded).level is Level.FAILURE


@pytest.mark.parametrize(
    ("files", "level", "found"),
    [
        ({}, Level.FAILURE, "nothing is mounted"),
        ({"cgroup.controllers": "cpuset cpu io memory pids"}, Level.OK, "v2"),
        ({"cgroup.controllers": "cpu pids"}, Level.WARNING, "v2 without memory"),
        ({"memory/tasks": ""}, Level.OK, "v1"),
        ({"memory/tasks": "", "unified/cgroup.procs": ""}, Level.OK, "hybrid"),
    ],
)
def test_cgroups(context: CheckContext, files: dict[str, str], level: Level, found: str) -> None:
    for name, text in files.items():
        put(context, f"/sys/fs/cgroup/{name}", text)
    result = one(host_checks.cgroups, context)
    assert result.level is level
    assert found in result.found


def test_iommu(context: CheckContext) -> None:
    assert one(host_checks.iommu, context).level is Level.WARNING
    put(context, "/sys/kernel/iommu_groups/0/type")
    put(context, "/sys/kernel/iommu_groups/1/type")
    assert one(host_checks.iommu, context).found == "2 groups, by groups (no /dev/iommu)"
    put(context, "/dev/iommu")
    assert one(host_checks.iommu, context).found == "2 groups, by iommufd and groups"


def test_dedicated_cpus_are_there_in_whole_cores(context: CheckContext) -> None:
    assert "any" in one(host_checks.dedicated_cpus, context).found
    put(context, "/sys/devices/system/node/online", "0\n")
    put(context, "/sys/devices/system/node/node0/cpulist", "0-7\n")
    for cpu in range(8):
        at = f"/sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list"
        put(context, at, f"{cpu % 4},{cpu % 4 + 4}\n")
    whole = replace(context, settings=SETTINGS.replace(dedicated_cpus="1-2,5-6"))
    assert one(host_checks.dedicated_cpus, whole).found == "1-2,5-6, in 2 cores"
    half = replace(context, settings=SETTINGS.replace(dedicated_cpus="1-3,5-6,9"))
    found = one(host_checks.dedicated_cpus, half)
    assert (found.level, found.found.split(" of ")[0]) == (Level.WARNING, "3,9")


def test_hugepages(context: CheckContext) -> None:
    assert "none reserved" in one(host_checks.hugepages, context).found
    for size, total, free in (("2048kB", 16, 4), ("1048576kB", 0, 0)):
        put(context, f"/sys/kernel/mm/hugepages/hugepages-{size}/nr_hugepages", f"{total}\n")
        put(context, f"/sys/kernel/mm/hugepages/hugepages-{size}/free_hugepages", f"{free}\n")
    assert one(host_checks.hugepages, context).found == "2048kB: 4 of 16 free"


@pytest.mark.parametrize(
    ("total_mib", "free_mib", "level"),
    [(1024, 512, Level.OK), (1024, 100, Level.WARNING), (200, 100, Level.FAILURE)],
)
def test_memory(context: CheckContext, total_mib: int, free_mib: int, level: Level) -> None:
    text = f"MemTotal:  {total_mib << 10} kB\nMemFree: 1 kB\nMemAvailable: {free_mib << 10} kB\n"
    put(context, "/proc/meminfo", text)
    assert one(host_checks.memory, context).level is level


def test_who_is_not_root_is_told(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert one(host_checks.root_user, context).level is Level.OK
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert one(host_checks.root_user, context).level is Level.WARNING


def test_a_host_name_that_resolves_slowly_is_a_warning(
    context: CheckContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_checks, "SLOW_NAME_S", 0.1)
    answers = threading.Event()
    try:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers.wait())
        slow = one(host_checks.host_name, context)
    finally:
        answers.set()
    assert slow.level is Level.WARNING
    assert "no answer yet after 0." in slow.found
    assert "/etc/hosts" in (slow.fix or "")

    def nobody(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(host_checks, "SLOW_NAME_S", 60)
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    assert one(host_checks.host_name, context).level is Level.OK  # what matters is that it is quick


# --- programs ---


@pytest.mark.parametrize(
    ("says", "level", "found"),
    [
        ("echo QEMU emulator version 7.2.22 '(Debian)'", Level.OK, "7.2.22 at "),
        ("echo QEMU emulator version 11.1", Level.OK, "11.1 at "),
        ("echo QEMU emulator version 7.1.9", Level.FAILURE, "7.1.9 at "),
        ("echo hello", Level.FAILURE, "does not tell its version"),
        ("echo libpixman is missing >&2; exit 1", Level.FAILURE, "ended with status 1"),
    ],
)
def test_qemu(host: Path, says: str, level: Level, found: str) -> None:
    path = program(host / "qemu", says)
    result = one(programs.qemu, CheckContext(SETTINGS.replace(qemu=path), ""))
    assert result.level is level
    assert found in result.found


def test_qemu_that_is_not_there(host: Path) -> None:
    result = one(programs.qemu, CheckContext(SETTINGS.replace(qemu="/nowhere/qemu"), ""))
    assert (result.level, result.fix) == (Level.FAILURE, "apt-get install qemu-system-x86")
    assert "/nowhere/qemu" in result.found


def libvirt_of(version: int) -> types.ModuleType:
    """A binding that only knows its version, as `import libvirt` finds it."""
    module = types.ModuleType("libvirt")
    module.getVersion = lambda: version  # type: ignore[attr-defined]
    return module


def test_libvirt(context: CheckContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    missing = one(programs.libvirt, context)
    assert missing.level is Level.FAILURE
    assert "python3-libvirt" in (missing.fix or "")

    monkeypatch.setitem(sys.modules, "libvirt", libvirt_of(8_999_001))
    assert one(programs.libvirt, context).found == "8.999.1, too old"

    monkeypatch.setitem(sys.modules, "libvirt", libvirt_of(12_008_000))
    without = one(programs.libvirt, context)
    assert without.level is Level.FAILURE
    assert "without its QEMU driver" in without.found

    put(context, "/usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so")
    result = one(programs.libvirt, context)
    assert (result.level, result.found) == (Level.OK, "12.8.0, with its QEMU driver")


def test_virtiofsd_and_firmware(host: Path) -> None:
    path = host / "virtiofsd"
    there = CheckContext(SETTINGS.replace(virtiofsd=str(path), firmware=str(path)), "")
    assert one(programs.virtiofsd, there).fix == "apt-get install virtiofsd"
    assert one(programs.firmware, there).fix == "apt-get install qemu-system-data"
    path.write_text("")
    assert "not executable" in one(programs.virtiofsd, there).found
    assert one(programs.firmware, there).level is Level.OK
    path.chmod(0o755)
    assert one(programs.virtiofsd, there).level is Level.OK


def test_qemu_user_must_exist(context: CheckContext) -> None:
    results = {
        result.name: result
        for result in programs.qemu_user(CheckContext(SETTINGS.replace(qemu_user="root"), ""))
    }
    assert results["user root"].found == "uid 0"
    assert "user libvirt-qemu" in results  # libvirt looks for it in any case
    (only,) = programs.qemu_user(CheckContext(SETTINGS.replace(qemu_user="auto"), ""))
    assert only.name == "user libvirt-qemu"
    (*_, nobody) = programs.qemu_user(CheckContext(SETTINGS.replace(qemu_user="no-such-user"), ""))
    assert nobody.level is Level.FAILURE
    assert (nobody.fix or "").startswith("adduser --system")


# --- images and directories ---


def test_a_missing_image_is_a_failure_only_for_the_default_profile(host: Path) -> None:
    large = SETTINGS.profiles["large"].replace(image="special")
    settings = SETTINGS.replace(image_dir=str(host / "images"), profiles=SETTINGS.profiles | {"large": large})
    levels = {result.name: result for result in store.images(CheckContext(settings, ""))}
    assert levels["image default"].level is Level.FAILURE
    assert levels["image default"].fix == "casemate image build"
    assert levels["image special"].level is Level.WARNING
    assert "profile large" in levels["image special"].found


def test_an_image_that_is_there_is_verified(host: Path) -> None:
    files = {}
    for name in ("vmlinux", "rootfs.erofs"):
        files[name] = host / name
        files[name].write_bytes(os.urandom(4096))
    images = ImageStore(host / "images")
    image = images.add("default", files, {"cmdline": "quiet"})
    context = CheckContext(SETTINGS.replace(image_dir=str(host / "images")), "")
    assert one(store.images, context).level is Level.OK
    next_tick()
    image.rootfs.chmod(0o600)
    image.rootfs.write_bytes(os.urandom(4096))
    damaged = one(store.images, context)
    assert damaged.level is Level.FAILURE
    assert "rootfs" in damaged.found


def test_run_directory_need_not_exist_yet(context: CheckContext) -> None:
    result = one(store.run_directory, context)
    assert result.level in (Level.OK, Level.FAILURE)
    assert "MiB free" in result.found


# --- containerd ---


@pytest.fixture
def peer(host: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    monkeypatch.setattr(containerd, "_TIMEOUT_S", 60.0)  # of a machine that is not slow
    started: list[subprocess.Popen[bytes]] = []

    def start(path: str = "/nowhere", *arguments: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "tests/unit/cli/containerd_peer.py"),
                str(host / "containerd.sock"),
                *arguments,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PATH": path},
            cwd=host,
        )
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        return process

    yield start
    for process in started:
        process.communicate()


def results_of(context: CheckContext) -> dict[str, Result]:
    return {result.name: result for result in containerd.containerd(context)}


def test_no_containerd_is_one_failure(context: CheckContext) -> None:
    (result,) = containerd.containerd(context)
    assert result.level is Level.FAILURE
    assert context.containerd in result.found


def test_a_socket_that_nobody_serves_is_one_failure(context: CheckContext) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(context.containerd)
    (result,) = containerd.containerd(context)
    assert result.level is Level.FAILURE
    assert "no answer at" in result.found


def test_containerd_without_the_shim_is_a_failure(
    context: CheckContext, peer: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    process = peer("/nowhere")
    assert containerd.daemon_pid(context.containerd) == process.pid
    results = results_of(context)
    assert results["containerd"].found == f"9.9.9 at {context.containerd}"
    shim = results["containerd's shim"]
    assert (shim.level, shim.fix) == (Level.FAILURE, "make install")
    assert "(/nowhere)" in shim.found


def test_the_shim_is_looked_for_on_containerds_own_path(
    context: CheckContext, host: Path, peer: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    (host / "bin").mkdir()
    path = program(host / "bin" / containerd.SHIM, "exit 0")
    peer(f"/nowhere:{host}/bin")
    shim = results_of(context)["containerd's shim"]
    assert (shim.level, shim.found) == (Level.OK, path)


STANZA = """
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.vm]
runtime_type = "io.containerd.casemate.v2"
"""


@pytest.mark.parametrize(
    ("text", "level", "found"),
    [
        ("version = 2\n", Level.WARNING, "no runtime of type"),
        (STANZA, Level.OK, "runtime vm in"),
        (
            STANZA.replace("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"),
            Level.OK,
            "runtime vm in",
        ),
        ("version = \n", Level.WARNING, "is not TOML"),
        (STANZA.replace("casemate", "runc"), Level.WARNING, "no runtime of type"),
        ('imports = ["conf.d/*.toml"]\nplugins = 3\n', Level.OK, "runtime vm in"),
    ],
)
def test_the_runtime_is_looked_for_in_containerds_own_config(
    context: CheckContext,
    host: Path,
    peer: Callable[..., "subprocess.Popen[bytes]"],
    text: str,
    level: Level,
    found: str,
) -> None:
    (host / "config.toml").write_text(text)
    (host / "conf.d").mkdir()
    (host / "conf.d/vm.toml").write_text('imports = ["../config.toml"]\n' + STANZA)
    peer("/nowhere", "--config", "config.toml")
    result = results_of(context)["containerd's config"]
    assert result.level is level
    assert found in result.found


def test_a_config_that_is_not_there_is_a_warning(
    context: CheckContext, host: Path, peer: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    peer("/nowhere", f"--config={host}/none.toml")
    result = results_of(context)["containerd's config"]
    assert result.level is Level.WARNING
    assert f"{host}/none.toml does not exist" in result.found


def test_the_packaged_stanza_is_found(
    context: CheckContext, peer: Callable[..., "subprocess.Popen[bytes]"]
) -> None:
    peer("/nowhere", "--config", str(ROOT / "config/containerd/casemate.toml"))
    assert results_of(context)["containerd's config"].level is Level.OK
