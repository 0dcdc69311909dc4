"""What a killed shim owes is run by whoever cleans up after it, once."""

import json
from pathlib import Path

import pytest

from rpc.errors import DataLoss
from shim import poststop
from shim.cleanup import clean_pod
from shim.journal import Entry, Journal, Kind
from shim.oci import Hook
from shim.paths import PodPaths


def state(container_id: str) -> dict[str, object]:
    return {"id": container_id, "status": "stopped", "bundle": "/no/such/bundle", "annotations": {}}


def hook(log: Path, status: int = 0) -> Hook:
    return Hook("/bin/sh", ("sh", "-c", f'cat >>{log}; echo " $A" >>{log}; exit {status}'), {"A": "env"})


@pytest.fixture
def paths(tmp_path: Path) -> PodPaths:
    paths = PodPaths("default", "p", tmp_path / "run")
    paths.directory.mkdir(parents=True)
    return paths


def ran(log: Path) -> list[str]:
    return [json.loads(line.rpartition(" ")[0])["id"] for line in log.read_text().splitlines()]


def test_what_is_owed_is_run_once_by_whoever_cleans_up(paths: PodPaths, tmp_path: Path) -> None:
    log = tmp_path / "log"
    journal = Journal(paths.journal)
    for name in ("one", "two", "three"):
        poststop.owe(journal, [hook(log), hook(log)], state(name))
    poststop.begin(journal, "two")
    journal.close()
    lines = poststop.run_owed(paths.journal)
    assert ran(log) == ["one", "one", "three", "three"]
    assert lines[0] == "what poststop hook /bin/sh of one undoes"
    assert poststop.run_owed(paths.journal) == []
    assert clean_pod(paths) == [f"directory {paths.directory}"]
    assert len(ran(log)) == 4


def test_a_container_of_the_same_name_owes_anew(paths: PodPaths, tmp_path: Path) -> None:
    journal = Journal(paths.journal)
    poststop.owe(journal, [hook(tmp_path / "old")], state("one"))
    poststop.begin(journal, "one")
    poststop.owe(journal, [hook(tmp_path / "new")], state("one"))
    journal.close()
    clean_pod(paths)
    assert ran(tmp_path / "new") == ["one"]
    assert not (tmp_path / "old").exists()


def test_a_failure_is_told_and_the_rest_goes_on(paths: PodPaths, tmp_path: Path) -> None:
    log = tmp_path / "log"
    journal = Journal(paths.journal)
    poststop.owe(journal, [hook(log, 3), hook(log)], state("one"))
    journal.close()
    undone = clean_pod(paths)
    assert undone[0] == "what poststop hook /bin/sh of one undoes failed: exit status 3: "
    assert ran(log) == ["one", "one"]
    assert not paths.directory.exists()


def test_an_entry_that_cannot_be_read_is_reported(paths: PodPaths) -> None:
    journal = Journal(paths.journal)
    journal.add(Entry(Kind.POSTSTOP, json.dumps({"hooks": [{"path": "/x"}], "state": {}})))
    journal.close()
    with pytest.raises(DataLoss, match="poststop hooks cannot be read"):
        poststop.run_owed(paths.journal)
