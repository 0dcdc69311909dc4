"""`casemate image`: what it prints and how it exits, on a store made by code."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from images.image import GuestImage
from images.store import ImageStore
from tests.unit.images.fakes import add_image


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageStore:
    monkeypatch.setenv("CASEMATE_IMAGE_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("CASEMATE_RUN_DIR", str(tmp_path / "run"))
    return ImageStore()


@pytest.fixture
def image(store: ImageStore, tmp_path: Path) -> GuestImage:
    return add_image(store, tmp_path)


def casemate(*words: str) -> Result:
    return CliRunner().invoke(app, ["image", *words])


def test_list_of_an_empty_store(store: ImageStore) -> None:
    done = casemate("list", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, [])
    assert casemate("list").exit_code == 0


def test_list_shows_names_digests_and_damage(store: ImageStore, image: GuestImage, tmp_path: Path) -> None:
    other = add_image(store, tmp_path, "other", rootfs="other")
    os.truncate(other.directory / "manifest.json", 3)
    text = casemate("list").stdout
    assert image.hex[:12] in text
    assert "damaged" in text
    entries = {entry["names"][0]: entry for entry in json.loads(casemate("list", "--json").stdout)}
    assert entries["default"]["digest"] == image.digest
    assert entries["default"]["size_bytes"] == image.size_bytes
    assert entries["default"]["problem"] is None
    assert "damaged" in entries["other"]["problem"]


def test_show(store: ImageStore, image: GuestImage) -> None:
    assert image.digest in casemate("show").stdout
    assert json.loads(casemate("show", image.hex[:8], "--json").stdout)["cmdline"] == "quiet"


def test_show_of_a_missing_image_says_how_to_get_it(store: ImageStore) -> None:
    done = casemate("show", "nothing")
    assert done.exit_code == 3
    assert "casemate image build" in done.output


def test_verify_names_what_is_damaged(store: ImageStore, image: GuestImage, tmp_path: Path) -> None:
    assert casemate("verify").exit_code == 0
    add_image(store, tmp_path, "other", rootfs="other").rootfs.write_text("damage")
    done = casemate("verify", "--json")
    assert done.exit_code == 1
    problems = [result["problem"] for result in json.loads(done.stdout)]
    assert len([p for p in problems if p is None]) == 1
    assert "rootfs.erofs" in str(problems)
    assert casemate("verify", "default").exit_code == 0


def test_rm(store: ImageStore, image: GuestImage) -> None:
    with store.lease(image):
        refused = casemate("rm", "default")
        assert refused.exit_code == 1
        assert "in use" in refused.output
    done = casemate("rm", "default", "--json")
    assert json.loads(done.stdout) == {"removed": [image.digest], "in_use": []}
    assert casemate("rm", "default").exit_code == 3


def test_gc(store: ImageStore, image: GuestImage, tmp_path: Path) -> None:
    add_image(store, tmp_path, rootfs="new")
    with store.lease(image):
        assert json.loads(casemate("gc", "--json").stdout) == {"removed": [], "in_use": [image.digest]}
        assert "in use" in casemate("gc").stdout
    assert f"removed {image.digest}" in casemate("gc").stdout


def test_build_of_a_suite_that_does_not_exist_names_the_reason(store: ImageStore, tmp_path: Path) -> None:
    done = casemate("build", "--mirror", f"file://{tmp_path}/no-mirror", "--suite", "nosuch")
    assert done.exit_code == 1
    assert "nosuch" in done.output
    assert store.list() == ()
