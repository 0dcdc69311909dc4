"""`casemate ps` and how pods are found."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.ps import age, size
from tests.unit.cli.conftest import Casemate, Host, Shim

NewShim = Callable[[], Shim]


def test_no_pods_is_an_empty_table(casemate: Casemate) -> None:
    result = casemate("ps")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "NAMESPACE  POD  STATE  ACCEL  PROFILE  VCPUS  MEMORY  IMAGE  CONTAINERS  DEVICES  AGE"
    ]
    assert json.loads(casemate("ps", "--json").stdout) == []


def test_a_pod_is_a_line(casemate: Casemate, pods: Host, new_shim: NewShim) -> None:
    pods.pod("default", "web", new_shim(), created_at=time.time() - 3 * 3600)
    lines = casemate("ps").stdout.splitlines()
    assert lines[1].split() == [
        "default",
        "web",
        "running",
        "tcg",
        "small",
        "1",
        "128MiB",
        "default",
        "1",
        "-",
        "3h",
    ]


def test_devices_are_counted_and_how_they_are_reached_is_said(
    casemate: Casemate, pods: Host, new_shim: NewShim
) -> None:
    one = {"address": "0000:3b:00.0", "title": "10de H100"}
    pods.pod("default", "web", new_shim(), devices=[one], device_access="iommufd")
    assert casemate("ps").stdout.splitlines()[1].split()[9:12] == ["1", "by", "iommufd"]
    assert json.loads(casemate("ps", "--json").stdout)[0]["devices"] == [one]
    for page_bytes, words in ((2 << 20, "1 by legacy, 2MiB pages"), (1 << 30, "1 by legacy, 1GiB pages")):
        name, access = f"huge-{page_bytes}", "legacy"
        pods.pod("default", name, new_shim(), devices=[one], device_access=access, hugepage_bytes=page_bytes)
        assert words in casemate("ps").stdout


def test_devices_that_a_running_pod_has_lost_are_counted(
    casemate: Casemate, pods: Host, new_shim: NewShim
) -> None:
    given = [{"address": f"0000:3b:00.{number}", "gone": number > 0} for number in range(3)]
    pods.pod("default", "web", new_shim(), devices=given, device_access="iommufd", hugepage_bytes=2 << 20)
    assert " 3 by iommufd, 2MiB pages, 2 gone " in casemate("ps").stdout


def test_cpus_that_are_the_pods_alone_are_named(casemate: Casemate, pods: Host, new_shim: NewShim) -> None:
    pods.pod("default", "web", new_shim(), vcpus=3, cpus=[4, 5, 9])
    assert "3 on 4-5,9 " in casemate("ps").stdout
    pods.pod("default", "odd", new_shim(), vcpus=3, cpus=["x"])
    assert " on " not in next(line for line in casemate("ps").stdout.splitlines() if " odd " in line)


def test_nothing_is_cut_however_long(casemate: Casemate, pods: Host, new_shim: NewShim) -> None:
    name = "x" * 200
    pods.pod("k8s.io", name, new_shim())
    assert name in casemate("ps").stdout


def test_a_pod_whose_shim_died_is_stale(casemate: Casemate, pods: Host, new_shim: NewShim) -> None:
    shim = new_shim()
    pods.pod("default", "web", shim)
    shim.kill()  # a zombie's pid and start time are still there
    result = casemate("ps")
    assert "stale" in result.stdout
    assert "casemate gc" in result.stderr
    (entry,) = json.loads(casemate("ps", "--json").stdout)
    assert (entry["state"], entry["shim_alive"]) == ("stale", False)


def test_a_pid_that_is_anothers_by_now_is_stale(casemate: Casemate, pods: Host, new_shim: NewShim) -> None:
    shim = new_shim()
    pods.pod("default", "web", shim, start_time=shim.start_time - 1)
    assert json.loads(casemate("ps", "--json").stdout)[0]["state"] == "stale"


def test_a_record_without_sense_is_stale_not_a_crash(casemate: Casemate, pods: Host) -> None:
    pods.pod("default", "a", pid="12", start_time=None, containers=3, memory_bytes="x", created_at="x")
    pods.pod("default", "b", containers=[{}], memory_bytes=1000)
    assert casemate("ps").exit_code == 0
    assert [entry["state"] for entry in json.loads(casemate("ps", "--json").stdout)] == ["stale", "stale"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff"])
def test_an_unreadable_state_is_unknown_and_said(casemate: Casemate, pods: Host, content: bytes) -> None:
    directory = pods.pod("default", "web")
    (directory / "state.json").write_bytes(content)
    result = casemate("ps")
    assert "unknown" in result.stdout
    assert str(directory) in result.stderr
    (directory / "state.json").unlink()
    assert "No such file" in casemate("ps").stderr


def test_ended_pods_are_listed_on_request_newest_first(
    casemate: Casemate, pods: Host, new_shim: NewShim
) -> None:
    pods.pod("default", "old", ended=True, created_at=1.0)
    pods.pod("default", "new", ended=True, created_at=2.0)
    pods.pod("default", "live", new_shim())
    assert [entry["id"] for entry in json.loads(casemate("ps", "--json").stdout)] == ["live"]
    everything = json.loads(casemate("ps", "--all", "--json").stdout)
    assert [(entry["id"], entry["state"]) for entry in everything] == [
        ("live", "running"),
        ("new", "ended"),
        ("old", "ended"),
    ]


def test_containers_are_counted_by_state(casemate: Casemate, pods: Host, new_shim: NewShim) -> None:
    states = ["running", "stopped", "running"]
    pods.pod("default", "web", new_shim(), containers=[{"id": "x", "state": state} for state in states])
    assert "2 running, 1 stopped" in casemate("ps").stdout


def test_json_holds_the_whole_record(casemate: Casemate, pods: Host, new_shim: NewShim) -> None:
    directory = pods.pod("default", "web", new_shim(), error="QEMU: no")
    (entry,) = json.loads(casemate("ps", "--json").stdout)
    record = json.loads((directory / "state.json").read_text())
    assert record.items() <= entry.items()
    assert entry["shim_alive"] is True


def test_text_from_a_guest_cannot_move_the_terminal(
    casemate: Casemate, pods: Host, new_shim: NewShim
) -> None:
    pods.pod("default", "web", new_shim(), image="\x1b]0;owned\x07\x1b[2Jx\ny")
    output = casemate("ps").stdout
    assert "\x1b" not in output
    assert "x y" in output
    assert "\x1b" not in casemate("ps", "--json").stdout


def test_who_may_not_read_is_told_to_be_root(
    casemate: Casemate, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    result = casemate("ps")
    assert result.exit_code == 4
    assert "Permission denied" in result.stderr
    assert "run it as root" in result.stderr


# --- finding ---


def found(casemate: Casemate, name: str) -> str:
    result = casemate("trace", name, "--json")
    assert result.exit_code == 0, result.stderr
    trace = json.loads(result.stdout)
    return f"{trace['namespace']}/{trace['id']}"


@pytest.fixture
def several(pods: Host, new_shim: NewShim) -> None:
    for namespace, name, ended in [
        ("default", "web-1", False),
        ("default", "web-2", False),
        ("other", "web-1", False),
        ("default", "web", False),
        ("default", "ended-1", True),
        ("default", "web-1x", True),
    ]:
        directory = pods.pod(namespace, name, None if ended else new_shim(), ended=ended)
        (directory / "trace.json").write_text(json.dumps({"namespace": namespace, "id": name, "spans": []}))


@pytest.mark.parametrize(
    ("name", "is_"),
    [
        ("web", "default/web"),  # an id goes before the beginning of others
        ("web-2", "default/web-2"),
        ("default/web-1", "default/web-1"),
        ("other/web-1", "other/web-1"),
        ("end", "default/ended-1"),
        ("web-1x", "default/web-1x"),
    ],
)
def test_a_pod_is_found_by(several: None, casemate: Casemate, name: str, is_: str) -> None:
    assert found(casemate, name) == is_


def test_a_name_of_several_pods_is_wrong_usage_and_names_them(several: None, casemate: Casemate) -> None:
    result = casemate("trace", "web-1")
    assert result.exit_code == 2
    assert "default/web-1, other/web-1" in result.stderr
    assert casemate("trace", "we").exit_code == 2


def test_no_such_pod_is_exit_code_3(several: None, casemate: Casemate) -> None:
    for command in ("trace", "logs"):
        result = casemate(command, "nosuch")
        assert result.exit_code == 3
        assert "no pod nosuch" in result.stderr
        assert "casemate ps --all" in result.stderr


# --- figures ---


@pytest.mark.parametrize(
    ("bytes_", "text"),
    [(0, "0"), (1023, "1023"), (1024, "1KiB"), (3 << 29, "1536MiB"), (2 << 30, "2GiB"), (None, "?")],
)
def test_sizes(bytes_: object, text: str) -> None:
    assert size(bytes_) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (172800, "2d")],
)
def test_ages(seconds: float, text: str) -> None:
    assert age(seconds) == text
