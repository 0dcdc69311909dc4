"""libvirt's embedded driver, as far as it needs no QEMU: its configuration, its cache, QEMU's own words."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from rpc.errors import FailedPrecondition, Unavailable
from shim.vm.host import CAPABILITIES, Host
from shim.vm.users import QemuUser
from tests.unit.shim import libvirts

USER = QemuUser(2_000_000_007, "+2000000007", "kvm")

# What libvirt 9.0 with QEMU 7.2 wrote, shortened by arguments alone.
COMMAND_LINE = """\
2026-11-21 10:21:27.668+0000: starting up libvirt version: 9.0.0, package: 9.0.0-4+deb12u2 (Debian), \
qemu version: 7.2.22Debian 1:7.2+dfsg-7+deb12u18+b3, kernel: 6.18.44, hostname: vm
LC_ALL=C \\
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \\
HOME=/run/casemate/pods/0123456789abcdef/libvirt/lib/qemu/domain-1-vm \\
/usr/bin/qemu-system-x86_64 \\
-name guest=vm,debug-threads=on \\
-S \\
-object '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/run/master-key.aes"}' \\
-machine pc-q35-7.2,usb=off,vmport=off,smm=off,dump-guest-core=off,memory-backend=pc.ram \\
-blockdev '{"driver":"file","filename":"/x","on-error":"report"}' \\
-msg timestamp=on
"""
NO_MEMORY = "qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory\n"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "libvirt", tmp_path / "ram", USER, tmp_path / "seeds", reach={})


def write_log(tmp_path: Path, text: str) -> None:
    path = tmp_path / "libvirt/log/qemu/vm.log"
    path.parent.mkdir(parents=True)
    path.write_text(text)


def test_qemu_runs_as_the_pods_own_user(host: Host, tmp_path: Path) -> None:
    host.prepare()
    files = [tmp_path / "libvirt/etc/qemu.conf", tmp_path / "libvirt/etc/qemu/qemu.conf"]
    for path in files:
        lines = path.read_text().splitlines()
        assert 'user = "+2000000007"' in lines
        assert 'group = "kvm"' in lines
        assert "seccomp_sandbox = 1" in lines
        assert "max_core = 0" in lines
        assert f'memory_backing_dir = "{tmp_path}/ram"' in lines
    assert (tmp_path / "libvirt").stat().st_mode & 0o777 == 0o711
    assert not (tmp_path / "libvirt" / CAPABILITIES).exists()


def test_what_was_learnt_about_qemu_serves_the_next_pod(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    first = Host(tmp_path / "first", tmp_path / "ram", USER, seeds, reach={})
    first.prepare()
    learnt = tmp_path / "first" / CAPABILITIES
    learnt.mkdir(parents=True)
    (learnt / "abc.xml").write_text("<qemuCaps/>")
    first._keep_seeds()
    assert [path.name for path in seeds.iterdir()] == ["abc.xml"]

    second = Host(tmp_path / "second", tmp_path / "ram", USER, seeds, reach={})
    second.prepare()
    assert (tmp_path / "second" / CAPABILITIES / "abc.xml").read_text() == "<qemuCaps/>"
    before = (seeds / "abc.xml").stat().st_ino
    second._keep_seeds()
    assert (seeds / "abc.xml").stat().st_ino == before, "nothing new was learnt"
    (tmp_path / "second" / CAPABILITIES / "abc.xml").write_text("<qemuCaps version='2'/>")
    second._keep_seeds()
    assert (seeds / "abc.xml").read_text() == "<qemuCaps version='2'/>"


def lean_host(root: Path, seeds: Path) -> Host:
    host = Host(root, root.parent / "ram", USER, seeds, cpu_models=False, reach={})
    host.prepare()
    (root / CAPABILITIES).mkdir(parents=True, exist_ok=True)
    return host


def test_a_pod_that_names_no_cpu_model_keeps_none_and_all_if_libvirt_wants_them(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    whole = "<qemuCaps>\n  <cpu type='tcg' name='486' usable='yes'/>\n</qemuCaps>\n"
    lean = "<qemuCaps>\n</qemuCaps>\n"
    first = lean_host(tmp_path / "first", seeds)
    (tmp_path / "first" / CAPABILITIES / "abc.xml").write_text(whole)
    first._keep_seeds()
    assert (seeds / "abc.xml").read_text() == lean

    second = lean_host(tmp_path / "second", seeds)
    learnt = tmp_path / "second" / CAPABILITIES / "abc.xml"
    assert learnt.read_text() == lean
    second._keep_seeds()
    assert (seeds / "abc.xml").read_text() == lean
    learnt.write_text(whole)  # it did not take what it was given, and asked QEMU
    second._keep_seeds()
    assert (seeds / "abc.xml").read_text() == whole
    lean_host(tmp_path / "third", seeds)._keep_seeds()
    assert (seeds / "abc.xml").read_text() == whole


def test_another_qemu_is_learnt_anew_without_models(tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    host = lean_host(tmp_path / "first", seeds)
    learnt = tmp_path / "first" / CAPABILITIES / "abc.xml"
    for time in (1, 2):
        learnt.write_text(f"<qemuctime>{time}</qemuctime>\n  <cpu name='486' usable='yes'/>\n")
        host._keep_seeds()
        assert (seeds / "abc.xml").read_text() == f"<qemuctime>{time}</qemuctime>\n"


def test_seeds_that_cannot_be_kept_cost_nothing_else(
    host: Host, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host.prepare()
    learnt = tmp_path / "libvirt" / CAPABILITIES
    learnt.mkdir(parents=True)
    (learnt / "abc.xml").touch()
    (tmp_path / "seeds").touch()
    host._keep_seeds()
    assert "capabilities of QEMU not kept" in caplog.text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", ""),
        (
            NO_MEMORY + "2026-11-21 10:21:28.162+0000: shutting down, reason=failed\n",
            "qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory",
        ),
        (
            "2026-11-21T10:21:27.960999Z qemu-system-x86_64: terminating on signal 15 from pid 1\n",
            "2026-11-21T10:21:27.960999Z qemu-system-x86_64: terminating on signal 15 from pid 1",
        ),
        ("libvirt: error : cannot execute binary /x\n", "libvirt: error : cannot execute binary /x"),
        ("Unexpected error in object_property_find() at ../qom/object.c:1239:\n", "Unexpected error"),
    ],
)
def test_qemus_own_words_are_told_from_its_command_line(
    host: Host, tmp_path: Path, words: str, expected: str
) -> None:
    write_log(tmp_path, COMMAND_LINE + words)
    said = host.log_tail("vm")
    assert expected in said
    assert "-machine" not in said
    assert "-blockdev" not in said
    assert "LC_ALL" not in said
    assert not [line for line in said.splitlines() if line.startswith("/usr/bin/qemu-system-x86_64")]
    if not expected:
        assert said == ""


def test_only_the_last_words_are_told(host: Host, tmp_path: Path) -> None:
    write_log(tmp_path, COMMAND_LINE + "".join(f"qemu-system-x86_64: error {n}\n" for n in range(100)))
    assert host.log_tail("vm").splitlines() == [f"qemu-system-x86_64: error {n}" for n in range(92, 100)]


def test_a_domain_that_never_started_has_no_words(host: Host) -> None:
    assert host.log_tail("vm") == ""


def test_a_failure_has_libvirts_words_and_qemus(host: Host, tmp_path: Path) -> None:
    write_log(tmp_path, COMMAND_LINE + "qemu-system-x86_64: no such device\n")
    error = host.failure("internal error: process exited", "vm")
    assert isinstance(error, Unavailable)
    assert error.brief == "QEMU did not start"
    assert error.details == "internal error: process exited\nqemu-system-x86_64: no such device"
    quoting = "internal error: QEMU unexpectedly closed the monitor: qemu-system-x86_64: no such device"
    assert host.failure(quoting, "vm").details == quoting
    late = "failed to connect to monitor socket: Connection refused"
    assert host.failure(late, "vm").details == f"{late}\nqemu-system-x86_64: no such device"


def libvirt_of(version: int) -> ModuleType:
    """A binding that only knows its version."""
    module = ModuleType("libvirt")
    module.getVersion = lambda: version  # type: ignore[attr-defined]
    module.registerErrorHandler = lambda handler, _: handler(None, None)  # type: ignore[attr-defined]
    return module


def test_a_libvirt_that_is_missing_is_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(FailedPrecondition, match="libvirt's Python binding cannot be imported") as caught:
        host.load()
    assert "python3-libvirt" in (caught.value.hint or "")


def test_a_libvirt_that_is_too_old_is_named_with_its_version(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", libvirt_of(8_010_000))
    with pytest.raises(FailedPrecondition, match=r"libvirt 8\.10 is too old: 9\.0 is the oldest"):
        host.load()


def test_a_libvirt_that_is_new_enough_is_taken(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", libvirt_of(9_000_000))
    host.load()


def path_as_libvirt_sees_it() -> str | None:
    """The environment of C, which os.environ is only a copy of."""
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    value: bytes | None = getenv(b"PATH")
    return None if value is None else value.decode()


@pytest.mark.parametrize("path", ["/usr/sbin:/usr/bin", None])
def test_libvirt_finds_no_program_while_it_is_opened(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    module = libvirt_of(12_008_000)
    seen: list[tuple[str, str | None, str | None]] = []
    for_ever = threading.Event()
    module.libvirtError = OSError  # type: ignore[attr-defined]
    module.virEventRegisterDefaultImpl = lambda: None  # type: ignore[attr-defined]
    module.virEventRunDefaultImpl = for_ever.wait  # type: ignore[attr-defined]
    module.open = lambda uri: seen.append(  # type: ignore[attr-defined]
        (uri, path_as_libvirt_sees_it(), os.environ.get("PATH"))
    )
    monkeypatch.setitem(sys.modules, "libvirt", module)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "")
    monkeypatch.delenv("PATH")
    if path is not None:
        monkeypatch.setenv("PATH", path)
    host.load()
    host.open()
    assert seen == [(f"qemu:///embed?root={tmp_path}/libvirt", "/nonexistent", path)]
    assert path_as_libvirt_sees_it() == os.environ.get("PATH") == path


def test_the_end_of_a_domain_is_waited_for(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """libvirt writes to its root until then. The event comes in a thread of libvirt's."""
    module = libvirt_of(9_000_000)
    module.VIR_DOMAIN_EVENT_STOPPED = 5  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "libvirt", module)
    host.load()
    assert host.wait_stopped(0.01)  # there is none
    host._domain = SimpleNamespace()
    host._on_lifecycle(None, None, 2, 0, None)
    assert not host.wait_stopped(0.01)
    threading.Thread(target=host._on_lifecycle, args=(None, None, 5, 0, None)).start()
    assert host.wait_stopped(10)


# --- devices that a domain loses ---

NVME, VMD = "0000:3b:00.0", "10000:e1:1f.7"


def followed(host: Host, domain: libvirts.Domain, *addresses: str) -> list[str]:
    gone: list[str] = []
    domain.host(host)
    host.follow_devices(addresses, gone.append, lambda: gone.append("halted"))
    return gone


def test_a_device_that_libvirt_says_is_removed_is_named_by_the_hosts_address(host: Host) -> None:
    domain = libvirts.Domain((NVME, VMD))
    gone = followed(host, domain, NVME, VMD)
    assert gone == []
    domain.tell("net0")
    assert gone == []
    domain.remove(VMD)
    assert gone == [VMD]
    domain.remove(NVME)
    assert gone == [VMD, NVME]


def test_one_that_was_lost_before_anybody_asked_is_told_at_once(host: Host) -> None:
    assert followed(host, libvirts.Domain((NVME,)), NVME, VMD) == [VMD]


def test_one_that_goes_while_libvirt_is_asked_is_told(host: Host) -> None:
    """Whether the answer has it yet or not."""
    domain = libvirts.Domain((NVME, VMD))
    domain.at_xml = lambda: domain.remove(VMD)
    assert followed(host, domain, NVME, VMD) == [VMD]


def test_that_qemu_stops_the_guest_is_told(host: Host) -> None:
    domain = libvirts.Domain((NVME,))
    gone = followed(host, domain, NVME)
    domain.halt()
    assert gone == ["halted"]
    assert host._stopped.is_set() is False


def test_a_libvirt_that_will_not_tell_says_why(host: Host) -> None:
    domain = libvirts.Domain((NVME,))
    domain.fails = "no such event"
    with pytest.raises(Unavailable, match=r"does not tell of devices that a machine loses: no such event"):
        followed(host, domain, NVME)
