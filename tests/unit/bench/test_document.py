"""A run's file comes back as it was written, and what is none is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import document
from rpc.errors import DataLoss, NotFound
from tests.unit.bench import runs


def written(tmp_path: Path) -> tuple[document.Document, Path]:
    found = runs.samples("run", {"runc": [0.1, 0.2], "casemate": [1.0, 2.0]}, source="boot")
    one = runs.document("boot", found, lives=[runs.life("casemate", "kernel")], machine="test bed")
    casemate = replace(one.ways[1], files=("9p",))
    one = replace(one, ways=(one.ways[0], casemate), trials=(document.Trials("casemate", 18, ("times",)),))
    one = replace(one, failures=(document.Failure("casemate", 1, "no room"),))
    path = tmp_path / "boot.json"
    document.write(one, path)
    return one, path


def test_a_run_comes_back_with_every_sample_and_its_turn(tmp_path: Path) -> None:
    one, path = written(tmp_path)
    assert document.read(path) == one
    assert [sample.turn for sample in document.read(path).samples] == [0, 1, 2, 3]
    assert one.sources("casemate", "run") == {"boot"}


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no\.json"):
        document.read(tmp_path / "no.json")


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"program": "fio"},
        {"kind": "lunch"},
        {"ways": []},
        {"samples": [{"way": "runc", "measure": "run", "value": 1.0, "round": 0, "turn": "0", "source": ""}]},
        {"samples": [{"way": "runc", "measure": "mood", "value": 1.0, "round": 0, "turn": 0, "source": ""}]},
        {"samples": [{"way": "podman", "measure": "run", "value": 1.0, "round": 0, "turn": 0}]},
        {"lives": [{"way": "runc", "turn": 0, "exec_s": 2.0, "exit_s": 1.0, "gone_s": 3.0, "spans": []}]},
        {"failures": [{"way": "podman", "round": 0, "text": "?"}]},
        {"failures": [{"way": "runc", "round": "0", "text": "?"}]},
        {"trials": [{"way": "podman", "tried": 1, "differences": []}]},
        {"trials": [{"way": "runc", "tried": 1, "differences": ["one", "two"]}]},
        {"surprise": 1},
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    _, path = written(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataLoss, match=r"boot\.json is not a file of"):
        document.read(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"schema": 1}', b"\xff"])
def test_what_is_no_json_of_ours_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataLoss):
        document.read(path)
