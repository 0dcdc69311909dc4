"""A source is what apt finds and verifies, of the version that was asked for and no other."""

from hashlib import sha256
from pathlib import Path

import pytest

from images.sources import fetch_source, source_version
from rpc.errors import FailedPrecondition

CONTENT = b"what its authors released"


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    """Of sources.list: a mirror on disk with the source of one package."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "crun_1.21.orig.tar.gz").write_bytes(CONTENT)
    (mirror / "crun_1.21-1.dsc").write_bytes(b"")
    files = [(name, (mirror / name).read_bytes()) for name in ("crun_1.21.orig.tar.gz", "crun_1.21-1.dsc")]
    sums = "".join(f"\n {sha256(content).hexdigest()} {len(content)} {name}" for name, content in files)
    (mirror / "Sources").write_text(
        "Package: crun\nBinary: crun\nVersion: 1.21-1\nArchitecture: any\nFormat: 3.0 (quilt)\n"
        f"Directory: .\nChecksums-Sha256:{sums}\n"
    )
    return [f"deb [trusted=yes] file:{mirror} ./"]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    directory = tmp_path / "target"
    directory.mkdir()
    return directory


def test_the_source_of_a_version(lines: list[str], target: Path) -> None:
    assert fetch_source("crun", "1.21-1", lines, target).read_bytes() == CONTENT


def test_another_version_is_not_taken_instead(lines: list[str], target: Path) -> None:
    with pytest.raises(FailedPrecondition, match="apt-get") as caught:
        fetch_source("crun", "1.22-1", lines, target)
    assert "1.22-1" in str(caught.value.details)


def test_a_source_of_other_content_is_refused(lines: list[str], target: Path, tmp_path: Path) -> None:
    (tmp_path / "mirror/crun_1.21.orig.tar.gz").write_bytes(CONTENT[::-1])
    with pytest.raises(FailedPrecondition, match="apt-get"):
        fetch_source("crun", "1.21-1", lines, target)


@pytest.mark.parametrize(
    ("binary", "source"),
    [("1.21-1", "1.21-1"), ("1.21-1+b2", "1.21-1"), ("1.8.1-1+deb12u1", "1.8.1-1+deb12u1")],
)
def test_a_rebuild_is_of_the_same_source(binary: str, source: str) -> None:
    assert source_version(binary) == source
