"""QEMU without libvirt: the command line that is read from libvirt's log, and what is said on a monitor."""

import json
import socket
import threading
from pathlib import Path

import pytest

from bench.by_hand import CommandLine, Monitor
from rpc.errors import DataLoss, Unavailable

LOG = """\
2026-11-21 10:21:27.668+0000: starting up libvirt version: 8.0.0, the one before
/usr/bin/another \\
-S
2026-11-21 10:21:28.162+0000: shutting down, reason=failed
2026-11-21 10:22:27.668+0000: starting up libvirt version: 9.0.0, qemu version: 7.2.22, hostname: vm
LC_ALL=C \\
PATH=/usr/sbin:/usr/bin \\
/usr/bin/qemu-system-x86_64 \\
-name guest=vm,debug-threads=on \\
-object '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"KEY"}' \\
-append 'console=ttyS0 quiet' \\
-msg timestamp=on
qemu-system-x86_64: own words
"""


def test_the_last_command_line_of_a_log_is_read_with_its_key(tmp_path: Path) -> None:
    key = tmp_path / "domain-1-vm" / "master-key.aes"
    key.parent.mkdir()
    key.write_bytes(b"\\x00secret")
    line = CommandLine.of_log(LOG.replace("KEY", str(key)))
    assert line.words[:3] == ["/usr/bin/qemu-system-x86_64", "-name", "guest=vm,debug-threads=on"]
    assert line.words[4] == f'{{"qom-type":"secret","id":"masterKey0","format":"raw","file":"{key}"}}'
    assert line.words[-4:] == ["-append", "console=ttyS0 quiet", "-msg", "timestamp=on"]
    assert line.environment == {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin"}
    assert line.files == {str(key): b"\\x00secret".hex()}


@pytest.mark.parametrize("log", ["", "libvirt: error : cannot execute binary /x\n"])
def test_a_log_without_one_is_named(log: str) -> None:
    with pytest.raises(DataLoss, match="no command line"):
        CommandLine.of_log(log)


class Qemu:
    """Answers each request with the next of what it was told to say, and keeps the requests."""

    def __init__(self, path: Path, *answers: list[object]) -> None:
        self.asked: list[object] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, args=(answers,))
        self._thread.start()

    def _serve(self, answers: tuple[list[object], ...]) -> None:
        connection, _ = self._listener.accept()
        with connection, self._listener:
            for messages in answers:
                self.asked.append(json.loads(connection.recv(4096)))
                for message in messages:
                    connection.sendall(json.dumps(message).encode() + b"\r\n")

    def join(self) -> None:
        self._thread.join(10)


def test_events_are_passed_over_until_the_answer_and_the_end_of_a_migration(tmp_path: Path) -> None:
    stop: object = {"event": "STOP"}
    states: list[object] = [
        {"event": "MIGRATION", "data": {"status": status}} for status in ("setup", "active", "completed")
    ]
    qemu = Qemu(tmp_path / "qmp", [stop, {"return": {"a": 1}}], [{"return": {}}, stop, *states])
    monitor = Monitor(tmp_path / "qmp")
    assert monitor.ask("query-a", {"b": 2}) == {"a": 1}
    monitor.ask("migrate-incoming", {"uri": "fd:state"})
    monitor.wait_migrated()
    monitor.close()
    qemu.join()
    assert qemu.asked[0] == {"execute": "query-a", "arguments": {"b": 2}}


def test_what_qemu_refuses_fails_or_leaves_unsaid_is_named(tmp_path: Path) -> None:
    failed: object = {"event": "MIGRATION", "data": {"status": "failed"}}
    qemu = Qemu(tmp_path / "qmp", [{"error": {"desc": "no such command"}}], [{"return": {}}, failed])
    monitor = Monitor(tmp_path / "qmp")
    with pytest.raises(Unavailable, match="QEMU refuses frobnicate"):
        monitor.ask("frobnicate", {})
    monitor.ask("migrate-incoming", {})
    with pytest.raises(Unavailable, match="does not take the state"):
        monitor.wait_migrated()
    with pytest.raises(Unavailable, match="closed its monitor"):
        monitor.next()
    monitor.close()
    qemu.join()
