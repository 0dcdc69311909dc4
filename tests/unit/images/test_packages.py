"""Fetching packages: when the cache answers, when it must not, and what a failure leaves.

mmdebstrap is a small program of the test's on PATH; the mirror is a web server on this machine, asked by apt.
"""

import http.server
import io
import json
import logging
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from images.packages import Form, Request, cache_dir, fetch, kept
from rpc.errors import FailedPrecondition

REQUEST = Request(("crun", "python3-minimal"))
MMDEBSTRAP = """\
#!{python}
import json, os, sys
from pathlib import Path
words = [w for w in sys.argv[1:] if not w.startswith("-")]
suite, target, *lines = words
with open({log!r}, "a") as log:
    log.write(json.dumps(dict(arguments=sys.argv[1:], epoch=os.environ.get("SOURCE_DATE_EPOCH"))) + "\\n")
if os.path.exists({fail!r}):
    Path(target).mkdir()
    sys.exit(Path({fail!r}).read_text())
if "--format=tar" in sys.argv:
    import shutil
    shutil.copy({tar!r}, target)
    sys.exit()
archives = Path(target, "var/cache/apt/archives")
archives.mkdir(parents=True)
(Path(target) / "usr/bin").mkdir(parents=True)
(Path(target) / "usr/bin/crun").write_text("crun")
for name in ("crun_1.21-1_amd64.deb", "zlib1g_1%3a1.3.dfsg+really1.3.1-1+b1_amd64.deb"):
    (archives / name).write_text("x")
Path(target, "var/lib/apt/lists").mkdir(parents=True)
"""
STATUS = """\
Package: bash
Status: install ok installed
Version: 5.2
Description: a shell
 Version: not this

Package: python3
Version: 1:3.13
"""


class Mirror:
    """A web server with InRelease files. Off: it refuses connections."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.publish("one")
        handler = type(
            "Handler",
            (http.server.SimpleHTTPRequestHandler,),
            {
                "__init__": lambda s, *a: http.server.SimpleHTTPRequestHandler.__init__(
                    s, *a, directory=directory
                ),
                "log_message": lambda *a: None,
            },
        )
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def publish(self, content: str) -> None:
        for suite in ("trixie", "trixie-security"):
            path = self.directory / "debian/dists" / suite / "InRelease"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{suite} {content}")

    def off(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    mirror = Mirror(tmp_path / "www")
    yield mirror
    if mirror.thread.is_alive():
        mirror.off()


@pytest.fixture
def etc(tmp_path: Path, mirror: Mirror) -> Path:
    (tmp_path / "etc/sources.list.d").mkdir(parents=True)
    uri = f"http://127.0.0.1:{mirror.port}/debian"
    (tmp_path / "etc/sources.list").write_text(f"deb {uri} bookworm main\ndeb {uri} bookworm-security main\n")
    return tmp_path / "etc"


class Mmdebstrap:
    def __init__(self, directory: Path) -> None:
        self.log = directory / "calls"
        self.log.touch()
        self.fail = directory / "fail"

    def calls(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]


@pytest.fixture
def mmdebstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mmdebstrap:
    fake = Mmdebstrap(tmp_path)
    archive = tmp_path / "installed.tar"
    with tarfile.open(archive, "w") as tar:
        member = tarfile.TarInfo("./var/lib/dpkg/status")
        member.size = len(STATUS)
        tar.addfile(member, io.BytesIO(STATUS.encode()))
    program = tmp_path / "bin/mmdebstrap"
    program.parent.mkdir()
    words = {"log": str(fake.log), "fail": str(fake.fail), "tar": str(archive), "python": "/usr/bin/python3"}
    program.write_text(MMDEBSTRAP.format(**words))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("APT_CONFIG", "/dev/null")
    return fake


def test_packages_are_unpacked_and_their_versions_recorded(
    tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap, mirror: Mirror
) -> None:
    found = fetch(REQUEST, tmp_path / "cache", apt_etc=etc)
    assert (found.path / "usr/bin/crun").read_text() == "crun"
    assert found.versions == {"crun": "1.21-1", "zlib1g": "1:1.3.dfsg+really1.3.1-1+b1"}
    assert not (found.path / "var/cache/apt/archives").exists()
    (call,) = mmdebstrap.calls()
    arguments = call["arguments"]
    assert isinstance(arguments, list)
    assert "--include=crun,python3-minimal" in arguments
    assert "--variant=extract" in arguments
    lines = [a.split("] ")[1] for a in arguments if a.startswith("deb [signed-by=")]
    uri = f"http://127.0.0.1:{mirror.port}/debian"
    assert lines == [f"{uri} trixie main", f"{uri} trixie-security main"]


def test_the_cache_answers_until_the_mirror_changes(
    tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap, mirror: Mirror
) -> None:
    assert not kept(REQUEST, tmp_path / "cache")
    first = fetch(REQUEST, tmp_path / "cache", apt_etc=etc)
    assert fetch(REQUEST, tmp_path / "cache", apt_etc=etc) == first
    assert len(mmdebstrap.calls()) == 1
    mirror.publish("two")
    assert kept(REQUEST, tmp_path / "cache")
    assert not kept(Request(("bash",)), tmp_path / "cache")
    second = fetch(REQUEST, tmp_path / "cache", apt_etc=etc)
    assert second.path != first.path
    assert len(mmdebstrap.calls()) == 2


def test_other_packages_are_another_entry(tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap) -> None:
    first = fetch(REQUEST, tmp_path / "cache", apt_etc=etc)
    second = fetch(Request(("bash",)), tmp_path / "cache", apt_etc=etc)
    assert first.path != second.path
    assert first.path.exists()


def test_other_components_are_another_entry_and_on_apts_lines(
    tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap
) -> None:
    first = fetch(REQUEST, tmp_path / "cache", apt_etc=etc)
    request = Request(REQUEST.packages, components=("main", "non-free"))
    assert fetch(request, tmp_path / "cache", apt_etc=etc).path != first.path
    said = [str(call["arguments"]).split("'") for call in mmdebstrap.calls()]
    lines = [[word for word in words if word.startswith("deb ")] for words in said]
    assert all(line.endswith(" main") for line in lines[0])
    assert all(line.endswith(" main non-free") for line in lines[1])


def test_old_entries_are_dropped(tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap, mirror: Mirror) -> None:
    paths = []
    for content in ("one", "two", "three"):
        mirror.publish(content)
        paths.append(fetch(REQUEST, tmp_path / "cache", apt_etc=etc).path)
    assert [path.exists() for path in paths] == [False, True, True]


def test_without_a_network_the_last_packages_are_used_and_it_is_said(
    tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap, mirror: Mirror, caplog: pytest.LogCaptureFixture
) -> None:
    first = fetch(REQUEST, tmp_path / "cache", apt_etc=etc)
    mirror.off()
    with caplog.at_level(logging.WARNING):
        assert fetch(REQUEST, tmp_path / "cache", apt_etc=etc) == first
    assert "fetched earlier" in caplog.text


def test_without_a_network_and_without_a_cache_the_error_is_apts(
    tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap, mirror: Mirror
) -> None:
    mirror.off()
    with pytest.raises(FailedPrecondition) as caught:
        fetch(REQUEST, tmp_path / "cache", apt_etc=etc)
    assert "apt-helper" in caught.value.brief
    assert "command: " in str(caught.value.details)
    assert mmdebstrap.calls() == []


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap) -> None:
    mmdebstrap.fail.write_text("E: apt has no package crun")
    with pytest.raises(FailedPrecondition) as caught:
        fetch(REQUEST, tmp_path / "cache", apt_etc=etc)
    assert "no package crun" in str(caught.value.details)
    assert [p.suffix for p in (tmp_path / "cache/packages").iterdir()] == [".lock"]
    mmdebstrap.fail.unlink()
    assert fetch(REQUEST, tmp_path / "cache", apt_etc=etc).path.exists()


def test_a_host_whose_keyring_is_too_old_is_told_so(
    tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap
) -> None:
    mmdebstrap.fail.write_text(
        "E: the following signatures could not be verified: NO_PUBKEY 0123456789ABCDEF"
    )
    with pytest.raises(FailedPrecondition) as caught:
        fetch(REQUEST, tmp_path / "cache", apt_etc=etc)
    assert "debian-archive-keyring" in str(caught.value.hint)


def test_an_installed_system_is_an_archive(
    tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "12345")
    found = fetch(Request(("bash",), Form.INSTALLED), tmp_path / "cache", apt_etc=etc)
    assert tarfile.is_tarfile(found.path)
    assert found.versions == {"bash": "5.2", "python3": "1:3.13"}
    (call,) = mmdebstrap.calls()
    assert call["epoch"] == "12345"


def test_a_named_mirror_is_asked_instead_of_the_machines(
    tmp_path: Path, mmdebstrap: Mmdebstrap, mirror: Mirror
) -> None:
    uri = f"http://127.0.0.1:{mirror.port}/debian"
    fetch(Request(("bash",), mirror=uri), tmp_path / "cache", apt_etc=tmp_path / "no-apt-here")
    (call,) = mmdebstrap.calls()
    assert str(call["arguments"]).count(uri) == 1


def test_several_builds_at_once_fetch_once(tmp_path: Path, etc: Path, mmdebstrap: Mmdebstrap) -> None:
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(REQUEST, tmp_path / "cache", apt_etc=etc)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({f.path for f in found}) == 1
    assert len(mmdebstrap.calls()) == 1


def test_the_cache_can_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASEMATE_CACHE_DIR", "/somewhere")
    assert cache_dir() == Path("/somewhere")
