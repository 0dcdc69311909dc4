"""What 9P2000.L promises, on real files, asked by a client of the protocol's own words."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shim.ninep import wire
from tests.unit.shim.ninep.client import MOST_FIDS, ROOT, Client, Refused, client_of

TEXT = wire.text


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What is served; a secret lies beside it."""
    (tmp_path / "secret").write_text("secret")
    served = tmp_path / "served"
    (served / "sub/deep").mkdir(parents=True)
    (served / "file").write_text("hello")
    (served / "sub/other").write_text("other")
    (served / "out").symlink_to("../secret")
    return served


@pytest.fixture
def client(tree: Path) -> Iterator[Client]:
    with client_of(tree) as connected:
        yield connected


def raises(number: int) -> pytest.RaisesExc[Refused]:
    """Of this number only."""
    return pytest.raises(Refused, check=lambda error: error.number == number)


# --- reading ---


def test_a_file_is_read_in_parts(client: Client) -> None:
    fid = client.walk("file")
    client.open(fid)
    assert client.read(fid, 3) == b"hel"
    assert client.read(fid, 100, offset=3) == b"lo"
    assert client.read(fid, 100, offset=5) == b""


def test_what_stat_says_is_what_the_host_says(client: Client, tree: Path) -> None:
    (tree / "sub/other").chmod(0o2751)
    found, expected = client.attributes(client.walk("sub", "other")), (tree / "sub/other").stat()
    assert found["mode"] == expected.st_mode
    assert (found["user"], found["group"]) == (expected.st_uid, expected.st_gid)
    assert (found["links"], found["size"]) == (1, 5)
    assert found["modified_ns"] == expected.st_mtime_ns
    assert (found["kind"], found["version"]) == (wire.QID_FILE, 0)


def test_hard_links_are_one_file_and_others_are_not(client: Client, tree: Path) -> None:
    (tree / "linked").hardlink_to(tree / "file")
    paths = {name: client.attributes(client.walk(name))["path"] for name in ("file", "linked", "sub")}
    assert paths["file"] == paths["linked"] != paths["sub"]


@pytest.mark.parametrize("count", [0, 1, 500])
@pytest.mark.parametrize("room", [300, 1 << 16])
def test_a_directory_is_read_completely(tree: Path, count: int, room: int) -> None:
    names = {f"{number}-{'x' * (number % 200)}" for number in range(count)}
    for name in names:
        (tree / "sub/deep" / name).touch()
    with client_of(tree) as client:
        fid = client.walk("sub", "deep")
        client.open(fid, os.O_RDONLY | os.O_DIRECTORY)
        found = client.names(fid, room)
        assert sorted(found) == sorted([".", "..", *names])
        (tree / "sub/deep/later").touch()
        assert "later" in client.names(fid, room)  # read from its start, it is read anew


def test_a_link_is_read_and_never_followed(client: Client) -> None:
    fid = client.walk("out")
    assert client.attributes(fid)["kind"] == wire.QID_SYMLINK
    assert client.ask(wire.READLINK, struct.pack("<I", fid)) == TEXT(b"../secret")
    with raises(errno.ELOOP):
        client.open(fid)
    with raises(errno.ENOTDIR):
        client.walk("out", "anything", start=client.walk("out"))


def test_a_part_of_a_walk_leaves_no_fid(client: Client) -> None:
    with pytest.raises(FileNotFoundError):
        client.walk("sub", "nothing", "more")
    with raises(errno.EBADF):
        client.attributes(1)
    with raises(errno.ENOENT):
        client.walk("nothing")


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b", b"/etc", b"../secret", b"a\0b"])
def test_a_name_that_leads_elsewhere_ends_the_connection(tree: Path, name: bytes) -> None:
    with client_of(tree) as client:
        body = struct.pack("<IIH", ROOT, 9, 1) + TEXT(name)
        client.send(wire.WALK, body)
        with pytest.raises((EOFError, ConnectionResetError)):
            client.receive()
        client.server.wait(20)
        client.server.returncode = 0  # it said why, as it has to


def test_statfs(client: Client, tree: Path) -> None:
    said = struct.unpack("<IIQQQQQQI", client.ask(wire.STATFS, struct.pack("<I", ROOT)))
    found = os.statvfs(tree)
    assert said[1] == found.f_bsize
    assert said[2] * said[1] == pytest.approx(found.f_blocks * found.f_frsize, rel=0.01)
    assert said[8] == 255


# --- writing ---


def test_a_file_is_made_and_written(client: Client, tree: Path) -> None:
    fid = client.walk("sub")
    client.create(fid, "new", os.O_RDWR | os.O_EXCL, 0o640)
    assert client.write(fid, b"0123456789") == 10
    assert client.write(fid, b"ab", offset=4) == 2
    assert client.read(fid, 100) == b"0123ab6789"
    client.ask(wire.FSYNC, struct.pack("<II", fid, 0))
    client.clunk(fid)
    assert (tree / "sub/new").read_bytes() == b"0123ab6789"
    assert stat.S_IMODE((tree / "sub/new").stat().st_mode) == 0o640


def test_what_somebody_else_made_meanwhile_is_opened_unless_it_has_to_be_new(
    client: Client, tree: Path
) -> None:
    fid = client.walk("sub")
    with raises(errno.EEXIST):
        client.create(fid, "other", os.O_RDWR | os.O_EXCL)
    client.create(fid, "other", os.O_RDWR, 0o600)
    assert client.read(fid, 100) == b"other"
    assert stat.S_IMODE((tree / "sub/other").stat().st_mode) == 0o644


def test_a_link_is_not_created_through(client: Client, tree: Path) -> None:
    with raises(errno.ELOOP):
        client.create(client.walk(), "out", os.O_RDWR)
    assert (tree.parent / "secret").read_text() == "secret"


def test_an_unlinked_file_goes_on(client: Client, tree: Path) -> None:
    """Which a server that goes by paths gets wrong."""
    fid = client.walk("file")
    client.open(fid, os.O_RDWR)
    client.ask(wire.UNLINKAT, struct.pack("<I", ROOT) + TEXT(b"file") + struct.pack("<I", 0))
    assert not (tree / "file").exists()
    assert client.read(fid, 10) == b"hello"
    assert client.write(fid, b"J") == 1
    assert client.attributes(fid)["links"] == 0
    client.ask(wire.SETATTR, struct.pack("<IIIIIQQQQQ", fid, 8, 0, 0, 0, 2, 0, 0, 0, 0))
    assert client.read(fid, 10) == b"Je"


def test_a_renamed_file_is_the_same_fid(client: Client, tree: Path) -> None:
    fid, directory = client.walk("file"), client.walk("sub")
    client.ask(
        wire.RENAMEAT,
        struct.pack("<I", ROOT) + TEXT(b"file") + struct.pack("<I", directory) + TEXT(b"moved"),
    )
    assert (tree / "sub/moved").read_text() == "hello"
    client.open(fid)
    assert client.read(fid, 10) == b"hello"


def test_directories_links_and_fifos_are_made_and_removed(client: Client, tree: Path) -> None:
    root = struct.pack("<I", ROOT)
    client.ask(wire.MKDIR, root + TEXT(b"made") + struct.pack("<II", 0o750, os.getgid()))
    client.ask(wire.SYMLINK, root + TEXT(b"soft") + TEXT(b"/etc/passwd") + struct.pack("<I", os.getgid()))
    client.ask(wire.LINK, root + struct.pack("<I", client.walk("file")) + TEXT(b"hard"))
    mode = stat.S_IFIFO | 0o600
    client.ask(wire.MKNOD, root + TEXT(b"fifo") + struct.pack("<IIII", mode, 0, 0, os.getgid()))
    assert stat.S_IMODE((tree / "made").stat().st_mode) == 0o750
    assert os.readlink(tree / "soft") == "/etc/passwd"
    assert (tree / "hard").samefile(tree / "file")
    assert (tree / "fifo").is_fifo()
    with raises(errno.EISDIR):
        client.ask(wire.UNLINKAT, root + TEXT(b"made") + struct.pack("<I", 0))
    client.ask(wire.UNLINKAT, root + TEXT(b"made") + struct.pack("<I", 0x200))
    for name in (b"soft", b"hard", b"fifo"):
        client.ask(wire.UNLINKAT, root + TEXT(name) + struct.pack("<I", 0))
    assert sorted(os.listdir(tree)) == ["file", "out", "sub"]


def test_a_fifo_does_not_hold_the_server_up(client: Client, tree: Path) -> None:
    os.mkfifo(tree / "fifo")
    client.open(client.walk("fifo"))
    fid = client.walk("fifo")
    client.open(fid, os.O_RDWR)
    with raises(errno.ESPIPE):
        client.read(fid, 10)


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_no_device_is_made(client: Client, tree: Path, kind: int) -> None:
    with raises(errno.EPERM):
        body = struct.pack("<I", ROOT) + TEXT(b"device") + struct.pack("<IIII", kind | 0o666, 1, 3, 0)
        client.ask(wire.MKNOD, body)
    assert not (tree / "device").exists()


def set_attributes(fid: int, valid: int, *values: int) -> bytes:
    return struct.pack("<IIIIIQQQQQ", fid, valid, *values)


def test_modes_sizes_and_times_are_set(client: Client, tree: Path) -> None:
    fid = client.walk("file")
    client.ask(wire.SETATTR, set_attributes(fid, 1, stat.S_IFREG | 0o4711, 0, 0, 0, 0, 0, 0, 0))
    assert stat.S_IMODE((tree / "file").stat().st_mode) == 0o4711
    client.ask(wire.SETATTR, set_attributes(fid, 8, 0, 0, 0, 3, 0, 0, 0, 0))
    assert (tree / "file").read_text() == "hel"
    client.ask(wire.SETATTR, set_attributes(fid, 0x20 | 0x100, 0, 0, 0, 0, 0, 0, 1000, 5))
    assert (tree / "file").stat().st_mtime_ns == 1000 * 10**9 + 5
    before = (tree / "file").stat().st_atime_ns
    client.ask(wire.SETATTR, set_attributes(fid, 0x20, 0, 0, 0, 0, 0, 0, 0, 0))  # now
    assert (tree / "file").stat().st_mtime_ns > 10**18
    assert (tree / "file").stat().st_atime_ns == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_new_files_belong_to_who_asked_and_keep_their_bits(tree: Path) -> None:
    with client_of(tree, begun=False) as client:
        client.begin(user=1234)
        fid = client.walk("sub")
        client.create(fid, "new", os.O_RDWR | os.O_EXCL, 0o6755, group=77)
        body = struct.pack("<I", client.walk()) + TEXT(b"made") + struct.pack("<II", 0o3777, 78)
        client.ask(wire.MKDIR, body)
        fid = client.walk("file")
        client.ask(wire.SETATTR, set_attributes(fid, 4, 0, 0, 99, 0, 0, 0, 0, 0))
    new, made = (tree / "sub/new").stat(), (tree / "made").stat()
    assert (new.st_uid, new.st_gid, stat.S_IMODE(new.st_mode)) == (1234, 77, 0o6755)
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (1234, 78, 0o3777)
    assert ((tree / "file").stat().st_uid, (tree / "file").stat().st_gid) == (0, 99)


# --- extended attributes ---


def read_value(client: Client, fid: int, name: bytes) -> bytes:
    reading = 500
    said = client.ask(wire.XATTRWALK, struct.pack("<II", fid, reading) + TEXT(name))
    value = client.read(reading, int.from_bytes(said, "little"))
    client.clunk(reading)
    return value


def write_value(client: Client, name: bytes, value: bytes, announced: int, flags: int = 0) -> None:
    fid = client.walk("file")
    client.ask(wire.XATTRCREATE, struct.pack("<I", fid) + TEXT(name) + struct.pack("<QI", announced, flags))
    if value:
        client.write(fid, value)
    client.clunk(fid)


def test_extended_attributes(client: Client, tree: Path) -> None:
    fid = client.walk("file")
    try:
        os.setxattr(tree / "file", "user.host", b"from the host")
    except OSError as error:
        pytest.skip(f"{tree} takes no user attributes: {error.strerror}")
    assert read_value(client, fid, b"user.host") == b"from the host"
    write_value(client, b"user.guest", b"from the guest", 14)
    assert os.getxattr(tree / "file", "user.guest") == b"from the guest"
    assert set(read_value(client, fid, b"").split(b"\0")) >= {b"user.host", b"user.guest"}
    write_value(client, b"user.guest", b"", 0, flags=2)
    assert "user.guest" not in os.listxattr(tree / "file")
    with raises(errno.ENODATA):
        read_value(client, fid, b"user.guest")


def test_an_attribute_is_as_long_as_it_was_announced(client: Client, tree: Path) -> None:
    with raises(errno.EINVAL):
        write_value(client, b"user.x", b"abc", 2)
    with raises(errno.EINVAL):
        write_value(client, b"user.x", b"abc", 4)
    with raises(errno.E2BIG):
        write_value(client, b"user.x", b"", 1 << 40)


# --- what a hostile client tries ---


def test_fids_are_limited(client: Client) -> None:
    with raises(errno.EMFILE):
        for _ in range(MOST_FIDS + 1):
            client.walk()
    client.clunk(1)
    client.walk("file")


def test_a_fid_in_use_is_not_replaced(client: Client) -> None:
    fid = client.walk("file")
    with raises(errno.EBADF):
        client.ask(wire.WALK, struct.pack("<IIH", ROOT, fid, 0))
    assert client.attributes(fid)["size"] == 5


def test_a_new_session_forgets_the_old_ones_files(client: Client) -> None:
    held = len(os.listdir(f"/proc/{client.server.pid}/fd"))
    for _ in range(10):
        client.open(client.walk("file"))
    client.begin()
    assert len(os.listdir(f"/proc/{client.server.pid}/fd")) == held


@pytest.mark.parametrize(
    ("kind", "body", "number"),
    [
        (wire.READ, struct.pack("<IQI", ROOT, 0, 10), errno.EBADF),
        (wire.READ, struct.pack("<IQI", 77, 0, 10), errno.EBADF),
        (wire.WRITE, struct.pack("<IQI", ROOT, 0, 1) + b"x", errno.EBADF),
        (wire.FSYNC, struct.pack("<II", ROOT, 0), errno.EBADF),
        (wire.READDIR, struct.pack("<IQI", ROOT, 0, 100), errno.EBADF),
        (wire.AUTH, struct.pack("<I", 1), errno.EOPNOTSUPP),
        (wire.RENAME, struct.pack("<I", 1), errno.EOPNOTSUPP),
        (255, b"", errno.EOPNOTSUPP),
        (wire.ATTACH, struct.pack("<II", 5, 6) + TEXT(b"") * 2 + struct.pack("<I", 0), errno.EINVAL),
        (wire.SYMLINK, struct.pack("<I", ROOT) + TEXT(b"n") + TEXT(b"a\0b") + bytes(4), errno.EINVAL),
    ],
)
def test_what_cannot_be_is_refused_and_the_connection_goes_on(
    client: Client, kind: int, body: bytes, number: int
) -> None:
    with raises(number):
        client.ask(kind, body)
    assert client.attributes(ROOT)["kind"] == wire.QID_DIRECTORY


def test_numbers_that_no_file_has_are_refused(client: Client) -> None:
    fid = client.walk("file")
    client.open(fid, os.O_RDWR)
    most = (1 << 64) - 1
    for kind, body in (
        (wire.READ, struct.pack("<IQI", fid, most, 1)),
        (wire.WRITE, struct.pack("<IQI", fid, most, 1) + b"x"),
        (wire.SETATTR, set_attributes(fid, 8, 0, 0, 0, most, 0, 0, 0, 0)),
        (wire.SETATTR, set_attributes(fid, 0x20 | 0x100, 0, 0, 0, 0, 0, 0, most, most)),
    ):
        with pytest.raises(Refused):
            client.ask(kind, body)
    assert client.read(fid, 10) == b"hello"


def test_a_read_is_no_longer_than_an_answer_may_be(client: Client, tree: Path) -> None:
    (tree / "large").write_bytes(bytes(4 << 20))
    fid = client.walk("large")
    client.open(fid)
    assert len(client.read(fid, (1 << 32) - 1)) == (1 << 19) - wire.READ_HEAD_BYTES


def frame(kind: int, body: bytes) -> bytes:
    return wire.HEAD.pack(wire.HEAD.size + len(body), kind, 1) + body


frames = st.one_of(
    st.binary(max_size=200),
    st.tuples(
        st.sampled_from([*range(0, 130, 2)]),
        st.lists(
            st.one_of(
                st.sampled_from([bytes(4), struct.pack("<I", 1), b"\xff" * 4, bytes(8), b"\xff" * 8]),
                st.sampled_from([TEXT(b"sub"), TEXT(b"file"), TEXT(b".."), TEXT(b"x" * 300)]),
                st.binary(max_size=12),
            ),
            max_size=6,
        ),
    ).map(lambda made: frame(made[0], b"".join(made[1]))),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(frames, min_size=1, max_size=30))
def test_nonsense_is_refused_or_ends_the_connection_and_reaches_nothing_else(
    tree: Path, nonsense: list[bytes]
) -> None:
    with client_of(tree) as client:
        client.walk("sub")
        try:
            client.connection.sendall(b"".join(nonsense))
            client.connection.shutdown(1)
            while client.connection.recv(1 << 16):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass
        client.server.wait(20)
        said = (client.server.stderr.read() if client.server.stderr else b"").decode()
        assert client.server.returncode == 0 or "shim.ninep.wire.Malformed: " in said, said
        client.server.returncode = 0
    assert (tree.parent / "secret").read_text() == "secret"
    assert sorted(os.listdir(tree.parent)) == ["secret", "served"]
