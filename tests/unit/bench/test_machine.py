"""What a run was made of: the commit of a checkout, and what differs from it."""

import subprocess
from pathlib import Path

import pytest

from bench import machine


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("docs/page.md", "shim/main.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("one\n")
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
    for words in (("init", "--quiet"), ("add", "."), (*who, "commit", "--quiet", "--message=first")):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    return tmp_path


def test_a_checkout_is_its_commit_whatever_a_run_wrote_into_docs(checkout: Path) -> None:
    found = machine.commit(checkout)
    head = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, check=True)
    assert len(found) >= 4
    assert head.stdout.decode().startswith(found)
    (checkout / "docs/page.md").write_text("two\n")
    (checkout / "docs/new.json").touch()
    assert machine.commit(checkout) == found


@pytest.mark.parametrize("name", ["shim/main.py", "shim/new.py"])
def test_a_checkout_with_changes_is_marked(checkout: Path, name: str) -> None:
    found = machine.commit(checkout)
    (checkout / name).write_text("two\n")
    assert machine.commit(checkout) == f"{found}+"


def test_a_checkout_without_a_commit_is_unknown(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    assert machine.commit(tmp_path) == "unknown"
