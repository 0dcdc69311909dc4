"""The machine's mirror, from apt sources as they are found in the wild."""

from pathlib import Path

import pytest

from images.apt import Source, mirror_lines, read_sources, source_lines
from rpc.errors import NotFound

DEB822 = """\
# the installer wrote this
Types: deb deb-src
URIs: http://mirror.example/debian/
Suites: bookworm bookworm-updates
Components: main non-free
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
# a comment in between
Suites: bookworm-security
Components:
 main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Enabled: no
Types: deb
URIs: http://disabled.example/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://sources.example/debian
Suites: bookworm
Components: main
"""
ONE_LINE = """\
deb http://mirror.example/debian bookworm main contrib # with a comment
#deb http://disabled.example/debian bookworm main
deb-src http://sources.example/debian bookworm main
deb [arch=amd64 signed-by=/etc/apt/vendor.gpg] https://vendor.example/debian bookworm stable

  deb  [ trusted=yes ]  http://security.example/debian-security  bookworm-security  main
deb cdrom:[Debian GNU/Linux 12]/ bookworm main
"""


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    return tmp_path


def uris(lines: list[str]) -> list[tuple[str, str]]:
    return [(line.split()[2], line.split()[3]) for line in lines]


def test_the_deb822_format(etc: Path) -> None:
    (etc / "sources.list.d/debian.sources").write_text(DEB822)
    sources = read_sources(etc)
    assert [(s.uri, s.suite) for s in sources] == [
        ("http://mirror.example/debian/", "bookworm"),
        ("http://mirror.example/debian/", "bookworm-updates"),
        ("http://mirror.example/debian-security", "bookworm-security"),
    ]
    assert sources[0].components == ("main", "non-free")
    assert sources[2].components == ("main",)
    assert uris(source_lines("trixie", sources)) == [
        ("http://mirror.example/debian/", "trixie"),
        ("http://mirror.example/debian/", "trixie-updates"),
        ("http://mirror.example/debian-security", "trixie-security"),
    ]


def test_the_one_line_format(etc: Path) -> None:
    (etc / "sources.list").write_text(ONE_LINE)
    sources = read_sources(etc)
    assert Source("http://mirror.example/debian", "bookworm", ("main", "contrib")) in sources
    vendor = Source("https://vendor.example/debian", "bookworm", ("stable",), "/etc/apt/vendor.gpg")
    assert vendor in sources
    assert not any("disabled" in s.uri or "sources.example" in s.uri for s in sources)
    assert uris(source_lines("trixie", sources)) == [
        ("http://mirror.example/debian", "trixie"),
        ("http://security.example/debian-security", "trixie-security"),
    ]


def test_both_formats_at_once_and_files_that_apt_ignores(etc: Path) -> None:
    (etc / "sources.list").write_text("")
    (etc / "sources.list.d/a.list").write_text("deb http://one.example/debian trixie main\n")
    (etc / "sources.list.d/b.sources").write_text(DEB822)
    (etc / "sources.list.d/c.list.disabled").write_text("deb http://disabled.example/debian trixie main\n")
    assert {s.uri.split("/")[2] for s in read_sources(etc)} == {"one.example", "mirror.example"}


def test_debians_own_archive_is_preferred_to_third_parties(etc: Path) -> None:
    (etc / "sources.list").write_text(
        "deb https://vendor.example/repos/prod bookworm main\n"
        "deb [signed-by=/etc/apt/vendor.gpg] https://other.example/debian bookworm main\n"
        "deb http://mirror.example/debian bookworm main\n"
        "deb https://more.example/tools bookworm main\n"
    )
    assert uris(source_lines("trixie", read_sources(etc))) == [("http://mirror.example/debian", "trixie")]


def test_every_line_is_verified_with_debians_keyring(etc: Path) -> None:
    (etc / "sources.list").write_text("deb [trusted=yes] http://mirror.example/debian bookworm main\n")
    (line,) = source_lines("trixie", read_sources(etc))
    assert "signed-by=" in line
    assert "trusted" not in line
    assert "signed-by=" in mirror_lines("trixie", "http://named.example/debian")[0]


def test_other_components_are_asked_for_whatever_the_machine_uses(etc: Path) -> None:
    (etc / "sources.list").write_text("deb http://mirror.example/debian bookworm main\n")
    wanted = ("main", "non-free-firmware")
    for lines in (
        source_lines("trixie", read_sources(etc), wanted),
        mirror_lines("trixie", "http://mirror.example/debian", wanted),
    ):
        assert lines[0].endswith(" http://mirror.example/debian trixie main non-free-firmware")


def test_unstable_has_no_updates(etc: Path) -> None:
    (etc / "sources.list.d/debian.sources").write_text(DEB822)
    assert uris(source_lines("sid", read_sources(etc))) == [("http://mirror.example/debian/", "sid")]


def test_a_machine_without_a_debian_mirror(etc: Path) -> None:
    (etc / "sources.list").write_text("deb http://other.example/ubuntu noble main\n")
    with pytest.raises(NotFound) as caught:
        source_lines("trixie", read_sources(etc))
    assert "--mirror" in str(caught.value.hint)


def test_a_machine_without_apt(tmp_path: Path) -> None:
    assert read_sources(tmp_path / "missing") == []
