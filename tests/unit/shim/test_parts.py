"""What containerd's mount manager means by its prefixes, done here: templates, directories, loop devices."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from rpc.api.types import Mount
from rpc.errors import CasemateError, InvalidArgument, Unimplemented
from shim import parts

PARTS = (Mount(type="ext4", source="/img/rw"), Mount(type="erofs", source="/img/a"), Mount(type="erofs"))


def overlay(*options: str, kind: str = "format/mkdir/overlay") -> Mount:
    return Mount(type=kind, source="overlay", options=list(options))


@pytest.fixture
def places(tmp_path: Path) -> Sequence[Path]:
    made = [tmp_path / str(number) for number in range(len(PARTS))]
    for place in made:
        place.mkdir()
    return made


def test_what_comes_before_the_last_that_names_others_is_a_part() -> None:
    top = overlay("lowerdir={{ mount 1 }}")
    assert parts.split([*PARTS, top]) == (list(PARTS), [top])
    plain = Mount(type="bind", source="/srv")
    assert parts.split([*PARTS, top, plain]) == (list(PARTS), [top, plain])
    assert parts.split(PARTS) == ((), PARTS)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("lowerdir={{ mount 1 }}:{{mount 2}}", "lowerdir={P}/1:{P}/2"),
        ("lowerdir={{ overlay 2 0 }}", "lowerdir={P}/2:{P}/1:{P}/0"),
        ("lowerdir={{ overlay 1 2 }}", "lowerdir={P}/1:{P}/2"),
        ("from={{ source 0 }}", "from=/img/rw"),
        ("index=off", "index=off"),
    ],
)
def test_a_format_names_where_parts_are(places: Sequence[Path], text: str, filled: str) -> None:
    made = parts.resolved(overlay(text), PARTS, places)
    assert (made.type, made.options) == ("overlay", [filled.replace("{P}", str(places[0].parent))])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("lowerdir={{ mount 3 }}", InvalidArgument),
        ("lowerdir={{ overlay 0 3 }}", InvalidArgument),
        ("lowerdir={{ overlay 1 }}", InvalidArgument),
        ("lowerdir={{ mount 0 1 }}", InvalidArgument),
        ("lowerdir={{ target 1 }}", Unimplemented),
        ("lowerdir={{ mount -1 }}", Unimplemented),
    ],
)
def test_a_format_that_cannot_be_filled_is_refused(
    places: Sequence[Path], text: str, error: type[CasemateError]
) -> None:
    with pytest.raises(error, match="rootfs: "):
        parts.resolved(overlay(text), PARTS, places)


def test_without_a_format_nothing_is_filled(places: Sequence[Path]) -> None:
    assert parts.resolved(overlay("{{ mount 0 }}", kind="overlay"), PARTS, places).options == [
        "{{ mount 0 }}"
    ]


def test_directories_are_made_in_a_part_with_the_mode_that_is_asked(places: Sequence[Path]) -> None:
    names = ("upper:0755", "work", f"own:0750:{os.getuid()}:{os.getgid()}")
    asked = [f"X-containerd.mkdir.path={{{{ mount 0 }}}}/{name}" for name in names]
    made = parts.resolved(overlay(*asked, "upperdir={{ mount 0 }}/upper"), PARTS, places)
    assert made.options == [f"upperdir={places[0]}/upper"]
    modes = {path.name: oct(path.stat().st_mode & 0o7777) for path in places[0].iterdir()}
    assert modes == {"upper": "0o755", "work": "0o700", "own": "0o750"}
    again = parts.resolved(overlay(asked[0].replace("0755", "0711")), PARTS, places)
    assert again.options == []
    assert (places[0] / "upper").stat().st_mode & 0o7777 == 0o711


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("/elsewhere/upper", Unimplemented),
        ("{{ mount 0 }}/../upper", InvalidArgument),
        ("{{ mount 0 }}/missing/upper", InvalidArgument),
        ("{{ mount 0 }}/link", InvalidArgument),
        ("{{ mount 0 }}/link/upper", InvalidArgument),
        ("{{ mount 0 }}/upper:0999", InvalidArgument),
        ("{{ mount 0 }}/upper:4755", InvalidArgument),
        ("{{ mount 0 }}/upper:0755:1", InvalidArgument),
    ],
)
def test_no_directory_is_made_elsewhere(
    tmp_path: Path, places: Sequence[Path], path: str, error: type[CasemateError]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (places[0] / "link").symlink_to(outside)
    with pytest.raises(error, match=r"X-containerd\.mkdir\.path="):
        parts.resolved(overlay(f"X-containerd.mkdir.path={path}"), PARTS, places)
    assert sorted(one.name for one in tmp_path.rglob("*")) == ["0", "1", "2", "link", "outside"]
