"""What containerd executes: flags, the pod a container belongs to, the address and how it is answered."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.load import load
from config.settings import Settings
from rpc.api.bootstrap import BootstrapParams, BootstrapResult
from rpc.api.options import Options
from rpc.api.task import DeleteResponse
from rpc.api.types import Any as AnyMessage
from rpc.api.types import RuntimeInfo
from rpc.errors import CasemateError, ResourceExhausted
from shim import bootstrap, contract
from shim.bootstrap import Arguments, Start, address_answer, is_served, pod_of, prepare
from shim.journal import Entry, Journal, Kind, read_journal
from shim.paths import PodPaths
from tests.unit.shim.conftest import children
from tests.unit.shim.pods import host

ADDRESS = "/run/containerd/containerd.sock"
FLAGS = ["-namespace", "default", "-address", ADDRESS, "-publish-binary", "/usr/bin/containerd", "-id", "web"]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A RUN and a directory for sockets, with paths short enough for socket addresses."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    with host(directory), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bootstrap, "SOCKET_DIR", str(directory / "s"))
        patch.delenv("TTRPC_ADDRESS", raising=False)
        patch.delenv("MAX_SHIM_VERSION", raising=False)
        yield directory
    shutil.rmtree(directory)


@pytest.fixture
def bundle(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, as containerd sets it."""
    path = run_dir / "bundle"
    path.mkdir()
    (path / "config.json").write_text("{}")
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def settings(run_dir: Path) -> Settings:
    return load()


def request_of(bundle: Path, pod_id: str = "web") -> Start:
    return Start(Arguments([*FLAGS, "start"]), str(bundle), pod_id, {})


def command(monkeypatch: pytest.MonkeyPatch, *words: str, stdin: bytes = b"") -> int:
    """Runs the shim's binary in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["containerd-shim-casemate-v2", *words])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    with pytest.raises(SystemExit) as caught:
        bootstrap.main()
    return caught.value.code if isinstance(caught.value.code, int) else 1


# --- arguments ---


def test_containerds_flags_are_understood() -> None:
    arguments = Arguments([*FLAGS, "-debug", "-bundle", "/b", "delete"])
    assert (arguments.namespace, arguments.address, arguments.id) == ("default", ADDRESS, "web")
    assert (arguments.publish_binary, arguments.bundle) == ("/usr/bin/containerd", "/b")
    assert arguments.debug
    assert not arguments.info
    assert arguments.action == "delete"


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_flags_are_gos(dashes: str) -> None:
    """One dash or two, the value after a space or an equals sign."""
    arguments = Arguments([f"{dashes}namespace=a=b", f"{dashes}id", "-odd", f"{dashes}bundle=", "start"])
    assert (arguments.namespace, arguments.id, arguments.bundle) == ("a=b", "-odd", "")
    assert arguments.action == "start"


@pytest.mark.parametrize(
    ("word", "debug"),
    [("-debug", True), ("-debug=true", True), ("-debug=false", False), ("--debug=0", False)],
)
def test_a_flag_can_be_said_to_be_off(word: str, debug: bool) -> None:
    assert Arguments([word, "start"]).debug is debug


@pytest.mark.parametrize("word", ["-nosuch", "--nosuch=1", "-"])
def test_an_unknown_flag_is_named(word: str) -> None:
    with pytest.raises(SystemExit, match="unknown flag " + word):
        Arguments([word])


@pytest.mark.parametrize("word", ["-info", "--info", "-v"])
def test_info_is_a_flag(word: str) -> None:
    assert Arguments([word]).info


@pytest.mark.parametrize("words", [[], ["-id", "web"], ["-id", "web", "stop"]])
def test_without_an_action_the_usage_is_said(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["shim", *words])
    with pytest.raises(SystemExit, match="usage: "):
        bootstrap.main()


@pytest.mark.parametrize("action", ["start", "delete"])
def test_without_an_id_nothing_is_started_and_nothing_deleted(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    assert command(monkeypatch, "-namespace", "default", "-address", ADDRESS, action) != 0


# --- the pod of a container ---


@pytest.mark.parametrize(
    ("annotations", "pod"),
    [
        (None, "web"),
        ({}, "web"),
        ({"io.kubernetes.cri.sandbox-id": "sandbox"}, "sandbox"),
        ({"io.containerd.runc.v2.group": "group"}, "group"),
        ({"io.kubernetes.cri.sandbox-id": "sandbox", "io.containerd.runc.v2.group": "group"}, "sandbox"),
        ({"io.kubernetes.cri.sandbox-id": ""}, "web"),
        ({"io.kubernetes.cri.sandbox-id": 7}, "web"),
    ],
)
def test_a_container_belongs_to_its_sandbox_or_its_group_or_itself(annotations: object, pod: str) -> None:
    """The sandbox first: containerd alone sets it, a group may come from a pod's annotations."""
    assert pod_of({"annotations": annotations}, "web", "default") == pod
    assert pod_of(None, "web", "default") == "web"


@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text(), min_size=1)))
def test_odd_annotations_are_no_group_or_an_error_of_ours(spec: dict[str, Any]) -> None:
    for document in (spec, {"annotations": spec}, *({"annotations": value} for value in spec.values())):
        try:
            assert pod_of(document, "web", "default")
        except CasemateError:
            continue


# --- the socket ---


def test_the_address_is_what_ctr_computes_too() -> None:
    """`ctr shim --id` finds a shim by this formula: sha256(address/namespace/id)."""
    digest = sha256(f"{ADDRESS}/default/web".encode()).hexdigest()
    assert bootstrap.socket_path(ADDRESS, "default", "web") == f"/run/containerd/s/{digest}"
    assert len(bootstrap.socket_path(ADDRESS, "n" * 76, "i" * 200)) <= 106


def test_a_socket_that_nobody_serves_is_removed(run_dir: Path) -> None:
    path = run_dir / "sock"
    assert not is_served(str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert is_served(str(path))
    assert path.exists()
    assert not is_served(str(path))
    assert not path.exists()


def test_a_pod_is_prepared_for(bundle: Path, run_dir: Path) -> None:
    request = request_of(bundle)
    with prepare(request) as listener:
        assert stat.S_IMODE(os.stat(request.socket_path).st_mode) == 0o600
        assert read_journal(request.paths.journal) == [Entry(Kind.SOCKET, request.socket_path)]
        assert is_served(request.socket_path)
        assert not listener.get_inheritable()


def test_what_a_killed_shim_left_is_cleaned_before(bundle: Path) -> None:
    request = request_of(bundle)
    request.paths.directory.mkdir(parents=True)
    (request.paths.directory / "shared").mkdir()
    request.paths.log.write_text("the last words of a shim")
    Journal(request.paths.journal).close()
    prepare(request).close()
    assert sorted(path.name for path in request.paths.directory.iterdir()) == ["journal.jsonl"]
    assert (request.paths.ended / "shim.log").read_text() == "the last words of a shim"


def test_a_socket_that_cannot_be_bound_leaves_nothing(bundle: Path, run_dir: Path) -> None:
    request = request_of(bundle)
    (run_dir / "s").mkdir()
    Path(request.socket_path).touch()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises((OSError, CasemateError)):
        prepare(request)
    assert not request.paths.directory.exists()
    assert len(os.listdir("/proc/self/fd")) == before
    mask = os.umask(0o22)
    os.umask(mask)
    assert mask != 0o177


def test_a_full_disk_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, __: object) -> None:
        raise OSError(28, "No space left on device")

    request = request_of(bundle)
    monkeypatch.setattr(Journal, "add", full)
    with pytest.raises(ResourceExhausted, match=f"{request.paths.directory}: No space left"):
        prepare(request)
    assert not request.paths.directory.exists()


def test_a_start_that_cannot_answer_leaves_no_daemon_and_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """containerd does not call `delete` after it: what was left would be left for ever."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    request = request_of(bundle)
    (bundle / ".address").mkdir()  # the address cannot be written
    before = len(os.listdir("/proc/self/fd"))
    assert command(monkeypatch, *FLAGS, "start") == 1
    out, err = capfdbinary.readouterr()
    assert (out, err.count(b"\n")) == (b"", 1)
    assert not request.paths.directory.exists()
    assert not Path(request.socket_path).exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_start_whose_caller_has_left_leaves_no_daemon_and_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    request = request_of(bundle)
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(io.FileIO(writer, "w"), write_through=True) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert command(monkeypatch, *FLAGS, "start") == 1
    assert not request.paths.directory.exists()
    assert not Path(request.socket_path).exists()


def test_a_start_that_cannot_fork_leaves_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    def fork() -> int:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    request = request_of(bundle)
    assert command(monkeypatch, *FLAGS, "start") == 1
    assert b"Resource temporarily unavailable" in capfdbinary.readouterr().err
    assert not request.paths.directory.exists()
    assert not Path(request.socket_path).exists()


def test_what_a_daemon_says_before_all_else_is_in_its_log(bundle: Path) -> None:
    """containerd reads what a start prints, stderr included, as the pod's address."""
    request = request_of(bundle)
    program = (
        "import sys, shim\n"
        "from pathlib import Path\n"
        "from shim import bootstrap\n"
        "sys.modules['shim.daemon'] = None  # it cannot even be imported\n"
        f"bootstrap.SOCKET_DIR = {bootstrap.SOCKET_DIR!r}\n"
        "bootstrap.main()\n"
    )
    root = Path(bootstrap.__file__).parents[1]
    before = children()
    done = subprocess.run(
        [sys.executable, "-c", program, *FLAGS, "start"],
        cwd=bundle,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        check=True,
    )
    assert (done.stdout.decode(), done.stderr) == (f"unix://{request.socket_path}", b"")
    (daemon,) = children() - before  # an orphan by now
    os.waitpid(daemon, 0)
    assert "shim.daemon" in request.paths.log.read_text()


def test_where_events_go_is_the_environments_or_beside_the_address(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert request_of(bundle).ttrpc_address == ADDRESS + ".ttrpc"
    monkeypatch.setenv("TTRPC_ADDRESS", "/run/other.ttrpc")
    assert request_of(bundle).ttrpc_address == "/run/other.ttrpc"


# --- the answer ---

PARAMS = BootstrapParams(instance_id="web", namespace="default", containerd_version="2.3.0").encode()
OPTIONS = AnyMessage(
    type_url="runtimeoptions.v1.Options", value=Options(type_url="x", config_path="/x").encode()
).encode()


def answered(settings: Settings, stdin: bytes, **changes: Any) -> bytes:
    return address_answer(Arguments([*FLAGS, "start"]), settings.replace(**changes), "unix:///s", stdin)


def test_who_asks_in_the_new_way_is_answered_in_it(settings: Settings) -> None:
    result = BootstrapResult.decode(answered(settings, PARAMS))
    assert (result.version, result.address, result.protocol) == (3, "unix:///s", "ttrpc")


@pytest.mark.parametrize(
    "stdin",
    [
        b"",
        OPTIONS,
        b"\xff\xff\xff",
        BootstrapParams(instance_id="other", namespace="default").encode(),
        BootstrapParams(instance_id="web", namespace="other").encode(),
    ],
)
def test_everybody_else_gets_a_plain_address(settings: Settings, stdin: bytes) -> None:
    assert answered(settings, stdin) == b"unix:///s"


def test_a_plain_address_can_be_demanded(settings: Settings) -> None:
    assert answered(settings, PARAMS, address_format="plain") == b"unix:///s"


@pytest.mark.parametrize(("most", "version"), [(None, 3), ("2", 2), ("3", 3), ("9", 3)])
def test_json_is_of_a_version_that_the_caller_knows(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, most: str | None, version: int
) -> None:
    if most is not None:
        monkeypatch.setenv("MAX_SHIM_VERSION", most)
    answer = json.loads(answered(settings, b"", address_format="json"))
    assert answer == {"version": version, "address": "unix:///s", "protocol": "ttrpc"}


def test_a_version_that_is_no_number_is_no_traceback(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_SHIM_VERSION", "two")
    try:
        assert json.loads(answered(settings, b"", address_format="json"))["version"] == 2
    except CasemateError:
        return


# --- the commands ---


def test_start_prints_the_address_of_a_shim_that_runs_already(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """The second container of a pod: nothing is forked, nothing is made."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    request = request_of(bundle)
    os.makedirs(bootstrap.SOCKET_DIR)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(request.socket_path)
        listener.listen()
        assert command(monkeypatch, *FLAGS, "start") == 0
    assert capfdbinary.readouterr() == (f"unix://{request.socket_path}".encode(), b"")
    assert (bundle / "address").read_text() == f"unix://{request.socket_path}"
    assert sorted(path.name for path in bundle.iterdir()) == ["address", "config.json"]
    assert not request.paths.directory.exists()


def test_a_container_whose_pod_is_gone_gets_no_machine_of_its_own(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    annotations = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}
    (bundle / "config.json").write_text(json.dumps({"annotations": annotations}))
    assert command(monkeypatch, *FLAGS, "start") == 1
    assert b"pod pod has no virtual machine any more" in capfdbinary.readouterr().err
    assert sorted(path.name for path in bundle.iterdir()) == ["config.json"]


def test_a_start_that_fails_says_one_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (bundle / "config.json").write_text("{")
    assert command(monkeypatch, *FLAGS, "start") == 1
    out, err = capfdbinary.readouterr()
    assert out == b""
    assert err.startswith(b"casemate: ")
    assert b"config.json is not JSON" in err
    assert err.count(b"\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "pod_of", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["shim", *FLAGS, "start"])
    with pytest.raises(ZeroDivisionError):
        bootstrap.main()


def test_info_says_who_we_are(
    monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert command(monkeypatch, "-info", stdin=OPTIONS) == 0
    info = RuntimeInfo.decode(capfdbinary.readouterr().out)
    assert info.name == "io.containerd.casemate.v2"
    assert info.version is not None
    assert info.version.version
    assert info.features is not None
    assert info.features.type_url == "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
    features = json.loads(info.features.value)
    assert "rro" in features["mountOptions"]  # CRI: a RuntimeHandler's recursive_read_only_mounts
    assert features["linux"]["mountExtensions"] == {"idmap": {"enabled": True}}  # its user_namespaces


def test_delete_answers_with_the_pid_that_was_told_and_leaves_nothing(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    paths = PodPaths("default", "web")
    paths.directory.mkdir(parents=True)
    paths.state.write_text(json.dumps({"containers": [{"id": "web", "pid": 4711}]}))
    assert command(monkeypatch, *FLAGS, "-bundle", "/nowhere", "delete") == 0
    out, err = capfdbinary.readouterr()
    response = DeleteResponse.decode(out)
    assert (response.pid, response.exit_status) == (4711, 137)
    assert response.exited_at is not None
    assert response.exited_at.seconds > 1_700_000_000
    assert f"removed directory {paths.directory}".encode() in err
    assert not paths.directory.exists()


def test_delete_of_what_is_gone_answers_too(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert command(monkeypatch, *FLAGS, "delete") == 0
    out, err = capfdbinary.readouterr()
    assert DeleteResponse.decode(out).pid == 0
    assert err == b""


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"containers": 7}', '{"containers": [7]}', '{"containers": []}']
)
def test_a_damaged_state_is_no_obstacle_to_delete(run_dir: Path, text: str) -> None:
    paths = PodPaths("default", "web")
    paths.directory.mkdir(parents=True)
    paths.state.write_text(text)
    assert contract.recorded_pid(paths) == 0
    paths.state.write_bytes(b"\xff")
    assert contract.recorded_pid(paths) == 0


def test_start_leaves_the_pod_to_the_daemon_and_answers(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    """The parent's side; the daemon's needs root: tests/vm."""
    monkeypatch.setattr(os, "fork", lambda: 4711)
    before = len(os.listdir("/proc/self/fd"))
    request = request_of(bundle)
    assert command(monkeypatch, *FLAGS, "start") == 0
    assert capfdbinary.readouterr() == (f"unix://{request.socket_path}".encode(), b"")
    assert len(os.listdir("/proc/self/fd")) == before, "the socket is the daemon's alone"
    assert read_journal(request.paths.journal) == [Entry(Kind.SOCKET, request.socket_path)]
    assert Path(request.socket_path).exists()


def test_a_socket_is_roots_alone_whatever_the_umask_which_stays_what_it_is(tmp_path: Path) -> None:
    """A shim that casemated makes like `start` may look at its umask at any moment."""
    seen: list[int] = []

    class Socket(socket.socket):
        def bind(self, address: Any, /) -> None:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            seen.append(int(status["Umask"], 8))
            super().bind(address)

    before = os.umask(0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "socket", Socket)
            with bootstrap.listen(str(tmp_path / "s")):
                pass
    finally:
        os.umask(before)
    assert seen == [0]
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
