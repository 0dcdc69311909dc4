"""`casemate config show|check`."""

import json
from pathlib import Path

import pytest

from config import places
from tests.unit.cli.conftest import Casemate


def test_show_says_where_each_value_came_from(
    casemate: Casemate, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CASEMATE_IMAGE_DIR")
    (host / "etc/config.toml").write_text('\naccel = "tcg"\n')
    lines = [line.split() for line in casemate("config", "show").stdout.splitlines()]
    assert ["accel", '"tcg"', f"{host}/etc/config.toml:2"] in lines
    by_key = {line[0]: line[1:] for line in lines}
    assert by_key["image_dir"][0] == '"/var/lib/casemate/images"'
    assert by_key["profiles.large.memory"][0] == '"2GiB"'
    assert by_key["profiles.large.image"][-1] == "(profiles.default.image)"
    assert by_key["timeouts.boot_s"][0] == "30.0"


def test_show_json_is_the_same(casemate: Casemate, host: Path) -> None:
    rows = json.loads(casemate("config", "show", "--json").stdout)
    by_key = {row["key"]: row for row in rows}
    assert by_key["traces_kept"]["value"] == 100
    assert by_key["traces_kept"]["from"].startswith(places.DEFAULT_FILE + ":")
    assert by_key["image_dir"] == {
        "key": "image_dir",
        "value": str(host / "images"),
        "from": "environment, CASEMATE_IMAGE_DIR",
    }
    assert len(rows) == len(casemate("config", "show").stdout.splitlines()) - 1


def test_check_of_a_valid_config_names_what_was_read(casemate: Casemate, host: Path) -> None:
    (host / "etc/config.toml").write_text("")
    result = casemate("config", "check")
    assert result.exit_code == 0
    assert result.stdout == f"valid, read from {places.DEFAULT_FILE}, {host}/etc/config.toml\n"
    assert json.loads(casemate("config", "check", "--json").stdout)["valid"] is True


def test_check_of_a_wrong_config_is_exit_code_1_and_names_all(casemate: Casemate, host: Path) -> None:
    path = host / "etc/config.toml"
    path.write_text("acel = 1\ntraces_kept = -1\n")
    result = casemate("config", "check")
    assert result.exit_code == 1
    assert f"{path}:1: unknown key acel" in result.stderr
    assert f"{path}:2: traces_kept: " in result.stderr
    answer = json.loads(casemate("config", "check", "--json").stdout)
    assert answer["valid"] is False
    assert "acel" in answer["error"] + answer["details"]


def test_show_of_a_wrong_config_is_the_same_error(casemate: Casemate, host: Path) -> None:
    (host / "etc/config.toml").write_text("acel = 1\n")
    result = casemate("config", "show")
    assert result.exit_code == 1
    assert "did you mean accel?" in result.stderr
