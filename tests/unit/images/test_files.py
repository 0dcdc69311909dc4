"""What images/ writes is root's alone, whatever the umask of whoever started it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from images.files import make_directory, write_new
from images.store import ImageStore
from tests.unit.images.fakes import add_image


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def writable_for_others(root: Path) -> list[str]:
    found = [root, *root.rglob("*")]
    return [str(p) for p in found if not p.is_symlink() and stat.S_IMODE(p.stat().st_mode) & 0o022]


@pytest.mark.usefixtures("no_umask")
def test_store_and_memory_are_writable_for_their_owner_only(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    store = ImageStore(tmp_path / "deep/below/store", tmp_path / "deep/run")
    image = add_image(store, tmp_path / "scratch")
    store.verify(image)
    assert writable_for_others(tmp_path / "deep") == []
    memory = tmp_path / "deep/run/cache/verified"
    assert stat.S_IMODE(memory.stat().st_mode) == 0o700
    assert (memory / image.hex).exists()


def test_a_directory_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir(mode=0o750)
    make_directory(tmp_path / "there", 0o700)
    assert stat.S_IMODE((tmp_path / "there").stat().st_mode) == 0o750


def test_a_file_in_the_way_of_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        make_directory(tmp_path / "file/below")


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("old")
    (tmp_path / "link").symlink_to("victim")
    for name in ("victim", "link"):
        with pytest.raises(FileExistsError):
            write_new(tmp_path / name, b"new")
    assert (tmp_path / "victim").read_text() == "old"


def test_half_a_file_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_new(tmp_path / "file", "not bytes")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
