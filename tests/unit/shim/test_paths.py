"""Where a pod's files are: one key per namespace and id, and never a socket path that is too long."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.paths import PodPaths, pod_key, run_dir

UNIX_PATH_MOST = 107


@given(st.text(max_size=300), st.text(max_size=300))
def test_a_key_is_a_file_name_whatever_the_pod_is_called(namespace: str, pod_id: str) -> None:
    key = pod_key(namespace.encode("utf-8", "ignore").decode(), pod_id.encode("utf-8", "ignore").decode())
    assert len(key) == 16
    assert set(key) <= set("0123456789abcdef")


def test_pods_of_two_namespaces_have_nothing_in_common() -> None:
    first, second = PodPaths("default", "web"), PodPaths("k8s.io", "web")
    assert first.directory != second.directory
    assert first.ended != second.ended


def test_a_pods_sockets_fit_into_a_socket_address() -> None:
    """With libvirt's monitor as the longest: the reason why keys are short."""
    monitor = PodPaths("a" * 76, "b" * 76).libvirt / "lib/qemu/domain-1-vm/monitor.sock"
    assert len(str(monitor)) <= UNIX_PATH_MOST


def test_everything_of_a_running_pod_is_in_its_directory(tmp_path: Path) -> None:
    paths = PodPaths("default", "web", tmp_path)
    files = (paths.state, paths.journal, paths.trace, paths.console, paths.log, paths.libvirt, paths.files)
    assert {path.parent for path in files} == {tmp_path / "pods" / paths.key}
    assert len(set(files)) == len(files)
    assert paths.ended == tmp_path / "ended" / paths.key
    assert not list(tmp_path.iterdir())


def test_the_run_directory_is_the_environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASEMATE_RUN_DIR", str(tmp_path))
    assert run_dir() == tmp_path
    assert PodPaths("a", "b").directory.is_relative_to(tmp_path)
    monkeypatch.setenv("CASEMATE_RUN_DIR", "")
    assert run_dir() == Path("/run/casemate")


def test_a_pod_is_found_by_its_key_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASEMATE_RUN_DIR", str(tmp_path))
    pod = PodPaths("default", "web")
    found = PodPaths.from_key(pod.key)
    assert (found.key, found.directory, found.ended) == (pod.key, pod.directory, pod.ended)
