"""`ctr run` of an unmodified image in a virtual machine: exit codes, environment, mounts, users, the
guest's kernel.
"""

import os
import platform
import shutil
from pathlib import Path

import pytest

from shim.vm.accel import probe
from tests.vm.builds import VERSIONS
from tests.vm.faults import find_process
from tests.vm.pods import CGROUP_MOUNT, FULL, Pods, every_version


@pytest.mark.client("ctr run", "works", "its exit status is the program's")
@pytest.mark.parametrize(
    ("instance", "code"),
    [(FULL, 0), *((version, 42) for version in VERSIONS), (FULL, 127)],
    indirect=["instance"],
)
def test_the_exit_code_is_the_programs(pods: Pods, code: int) -> None:
    result = pods.run("sh", "-c", f"echo to-stdout; echo to-stderr >&2; exit {code}")
    assert result.code == code, result
    assert (result.stdout, result.stderr) == (b"to-stdout\n", b"to-stderr\n")


@every_version
def test_the_kernel_is_the_guests(pods: Pods) -> None:
    result = pods.run("sh", "-c", "cat /proc/sys/kernel/osrelease /proc/sys/kernel/random/boot_id").ok()
    release, boot_id = result.out.split()
    assert release != platform.release()
    with open("/proc/sys/kernel/random/boot_id") as file:
        assert boot_id != file.read().strip()


def test_the_guest_has_no_virtualization_of_its_own(pods: Pods) -> None:
    """QEMU's emulated CPU has AMD's unless it is taken away; a processor with KVM has its maker's."""
    flags = pods.run("sh", "-c", "grep -m1 ^flags /proc/cpuinfo").ok().out.split()
    assert "lm" in flags
    assert {"svm", "vmx"}.isdisjoint(flags)


def test_the_kernel_of_an_emulated_cpu_keeps_off_what_qemu_emulates_wrongly(pods: Pods) -> None:
    """What programs see, CPUID, stays: some C libraries refuse a CPU without cmpxchg16b."""
    flags = pods.run("sh", "-c", "grep -m1 ^flags /proc/cpuinfo").ok().out.split()
    assert ("cx16" in flags) == (probe().kind == "kvm")


def test_a_cpu_model_that_the_operator_names_is_the_guests(pods: Pods) -> None:
    """The libvirt of other pods knows of none, nor is told what QEMU has; this one's does and is."""
    cache = pods.ctr.instance.path("/run/casemate/cache")
    pods.run("true").ok()
    lean = set(cache.glob("libvirt-*-lean/*.xml"))  # a file for each QEMU that a test has used
    assert lean
    assert not any(b"<cpu " in path.read_bytes() for path in lean)
    pods.ctr.instance.configure('[profiles.default]\ncpu_model = "Opteron_G3"\n')
    model = pods.run("sh", "-c", "grep -m1 '^model name' /proc/cpuinfo").ok().out
    assert "Opteron 23xx (Gen 3 Class Opteron)" in model
    whole = set(cache.glob("libvirt-*/*.xml")) - lean
    assert whole
    assert all(b"<cpu " in path.read_bytes() for path in whole)


def test_arguments_arrive_as_they_were_given(pods: Pods) -> None:
    words = ("", " two  words ", "quote'\"", "$HOME", "new\nline", "ünïcødé", "-n")
    script = "import sys, json; print(json.dumps(sys.argv[1:]))"
    result = pods.run("python3", "-c", script, *words).ok()
    assert eval(result.out) == list(words)  # noqa: S307 - JSON of strings, from our own program


@pytest.mark.client("ctr run --env, --cwd", "works", "")
def test_environment_and_working_directory(pods: Pods) -> None:
    options = ("--env", "GREETING=hello world", "--env", "EMPTY=", "--cwd", "/usr/share")
    result = pods.run("sh", "-c", 'pwd; echo "$GREETING"; echo "${EMPTY-unset}"', options=options).ok()
    assert result.out == "/usr/share\nhello world\n\n"


@pytest.mark.client("ctr run --user", "works", "")
def test_user_and_group(pods: Pods) -> None:
    result = pods.run("sh", "-c", "id -u; id -g; id -G", options=("--user", "65534:33")).ok()
    assert result.out.split() == ["65534", "33", "33"]


@pytest.mark.client("ctr run --hostname", "works", "")
def test_hostname(pods: Pods) -> None:
    result = pods.run("cat", "/proc/sys/kernel/hostname", options=("--hostname", "keep-tower")).ok()
    assert result.out == "keep-tower\n"


@pytest.mark.client("ctr run --mount type=bind (a directory)", "works", "by virtio-fs")
def test_a_bind_mounted_directory_is_shared_both_ways(pods: Pods) -> None:
    shared = pods.ctr.instance.work / "shared"
    (shared / "sub").mkdir(parents=True)
    (shared / "sub" / "in").write_text("from the host")
    mount = f"type=bind,src={shared},dst=/srv/shared,options=rbind:rw"
    command = "cat /srv/shared/sub/in; echo from the guest > /srv/shared/out"
    result = pods.run("sh", "-c", command, options=("--mount", mount)).ok()
    assert result.out == "from the host"
    assert (shared / "out").read_text() == "from the guest\n"


@pytest.mark.client("ctr run --mount options=ro", "works", "")
def test_a_read_only_bind_mount_cannot_be_written(pods: Pods) -> None:
    shared = pods.ctr.instance.work / "read-only"
    shared.mkdir()
    mount = f"type=bind,src={shared},dst=/srv/shared,options=rbind:ro"
    result = pods.run("sh", "-c", "echo no > /srv/shared/out", options=("--mount", mount))
    assert result.code != 0
    assert "Read-only file system" in result.err
    assert os.listdir(shared) == []


@pytest.mark.client("ctr run --mount type=bind (a file)", "works", "")
@every_version
def test_a_single_file_can_be_mounted(pods: Pods) -> None:
    source = pods.ctr.instance.work / f"{pods.ctr.new_id('file')}.txt"
    source.write_text("one file\n")
    mount = f"type=bind,src={source},dst=/etc/one-file,options=bind:ro"
    result = pods.run("cat", "/etc/one-file", options=("--mount", mount)).ok()
    assert result.out == "one file\n"


def test_a_mounted_file_is_all_of_its_directory_that_the_guest_sees(pods: Pods) -> None:
    directory = pods.ctr.instance.work / "with-a-secret"
    directory.mkdir()
    (directory / "shown").write_text("shown\n")
    (directory / "secret").write_text("secret\n")
    mount = f"type=bind,src={directory / 'shown'},dst=/etc/shown,options=bind:ro"
    result = pods.run("sh", "-c", "cat /etc/shown; ls -A /etc/secret", options=("--mount", mount))
    assert result.out == "shown\n"
    assert result.code != 0


def test_writes_stay_in_the_containers_own_layer(pods: Pods) -> None:
    pods.run("sh", "-c", "echo gone > /etc/motd-of-mine && rm /etc/hostname; cat /etc/motd-of-mine").ok()
    result = pods.run("ls", "/etc/motd-of-mine")
    assert result.code != 0


@pytest.mark.client("ctr run --read-only", "works", "")
def test_a_read_only_root(pods: Pods) -> None:
    result = pods.run("sh", "-c", "echo x > /etc/x", options=("--read-only",))
    assert result.code != 0
    assert "Read-only file system" in result.err


@pytest.mark.client("ctr run --snapshotter erofs", "works", "without default_size")
def test_layers_that_containerd_mounts_are_there(pods: Pods) -> None:
    """erofs, by the mount manager of containerd 2.2, which mounts them when the pod has begun."""
    plugins = pods.ctr("plugins", "list", "type==io.containerd.snapshotter.v1").ok().out
    if not any(line.split()[1::2] == ["erofs", "ok"] for line in plugins.splitlines()):
        pytest.skip(f"containerd has no erofs snapshotter here:\n{plugins}")
    script = "echo mine >/made; cat /made; ls /usr/bin/python3; touch /usr/changed"
    done = pods.run("sh", "-c", script, options=("--snapshotter", "erofs")).ok()
    assert done.out == "mine\n/usr/bin/python3\n"


@pytest.mark.client("ctr run --rootfs", "works", "")
def test_a_directory_can_be_the_root_file_system(pods: Pods) -> None:
    """`ctr run --rootfs`: no snapshot, no mounts, only root.path."""
    root = pods.ctr.instance.work / "a-root"
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/sh")
    command = ("/bin/sh", "-c", "echo mine > /made; echo /*")
    name = pods.ctr.new_id()
    result = pods.ctr("run", "--rm", "--runtime", pods.runtime, "--rootfs", str(root), name, *command).ok()
    assert {"/bin", "/made", "/proc"} <= set(result.out.split())
    assert (root / "made").read_text() == "mine\n"


def test_a_root_file_system_that_is_not_there_is_named(pods: Pods) -> None:
    name = pods.ctr.new_id()
    result = pods.ctr("run", "--rm", "--runtime", pods.runtime, "--rootfs", "/no/such/root", name, "true")
    assert result.code != 0
    assert "/no/such/root: No such file or directory" in result.err


@pytest.mark.client("ctr run", "works", "only loopback where nobody made a network")
def test_only_loopback_without_a_network(pods: Pods) -> None:
    script = "import os, socket; print(sorted(os.listdir('/sys/class/net')))\n"
    script += (
        "s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname()); print('up')"
    )
    result = pods.run("python3", "-c", script).ok()
    assert result.out == "['lo']\nup\n"


@pytest.mark.client("ctr run --memory-limit, --cpus", "works", "the container's cgroup in the guest")
def test_the_memory_limit_is_the_cgroups(pods: Pods) -> None:
    options = ("--memory-limit", str(64 << 20), *CGROUP_MOUNT)
    result = pods.run("cat", "/sys/fs/cgroup/memory.max", options=options).ok()
    assert int(result.out) == 64 << 20


def test_beyond_its_memory_limit_a_container_is_killed(pods: Pods) -> None:
    result = pods.run("python3", "-c", "b = bytearray(200 << 20)", options=("--memory-limit", str(64 << 20)))
    assert result.code == 137, result


@pytest.mark.client("ctr run --memory-limit, --cpus, beyond the profile", "works", "the VM is larger, too")
def test_a_machine_is_as_large_as_its_containers_limits(pods: Pods) -> None:
    """The memory is there to be used: the guest's own needs come on top of it."""
    script = "import os; b = bytearray(270 << 20); print(len(b) >> 20, os.cpu_count())"
    options = ("--memory-limit", str(288 << 20), "--cpus", "1.5")
    result = pods.run("python3", "-c", script, options=options).ok()
    assert result.out.split() == ["270", str(min(2, os.cpu_count() or 1))]


def test_the_clock_is_the_hosts(pods: Pods) -> None:
    import time

    before = time.time()
    inside = float(pods.run("python3", "-c", "import time; print(time.time())").ok().out)
    assert before - 0.1 < inside < time.time() + 0.1


SET_BACK = """\
import time
time.clock_settime(time.CLOCK_REALTIME, time.time() - 7200)
late = time.time() + 3600
print('set back', flush=True)
while time.time() < late:
    time.sleep(0.05)
print(time.time(), flush=True)
"""


def test_the_clock_of_a_running_guest_is_set_when_the_hosts_is(pods: Pods) -> None:
    """To what it is already, here: others use this host."""
    import time

    options = ("--cap-add", "CAP_SYS_TIME")
    with pods.start("python3", "-c", SET_BACK, name=pods.ctr.new_id(), options=options) as running:
        running.read_until(b"set back\n", 60)
        before = time.time()
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns())
        inside = float(running.read_until(b"\n", 60))
        assert running.finish(30).code == 0
    assert before - 0.1 < inside < time.time() + 0.1


def test_qemu_runs_as_the_user_that_the_operator_names(pods: Pods) -> None:
    """Whose group has another name: nobody's is nogroup."""
    pods.ctr.instance.configure('qemu_user = "nobody"\n')
    with pods.detached("sleep", "1000") as name:
        assert pods.exec(name, "echo", "fine").ok().out == "fine\n"
        qemu = Path(f"/proc/{find_process(pods.ctr.instance, 'qemu-system')}")
        assert (qemu.stat().st_uid, qemu.stat().st_gid) == (65534, 65534)
