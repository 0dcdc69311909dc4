"""Mounts with mapped IDs, made by this machine's kernel."""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpc.api.types import Mount
from rpc.errors import CasemateError, InvalidArgument, Unavailable, Unimplemented
from shim import idmap, rootfs, system
from shim.oci import IdMappings
from shim.spec import SharedMount
from tests.unit.agent.waiting import until

RANGES = ((0, 300000, 65536),)
MAPPED = IdMappings(RANGES, ((0, 400000, 65536),))
OPTIONS = ("uidmap=0:300000:65536", "gidmap=0:400000:65536")
by_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@pytest.fixture
def own_mounts() -> Iterator[None]:
    """A mount namespace of the test's own, as a pod has one: nothing of it is ever the machine's."""
    before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    system.unshare(system.CLONE_NEWNS)
    system.mount("none", "/", None, system.MS_REC | system.MS_PRIVATE)
    here = os.getcwd()
    yield
    system.setns(before, system.CLONE_NEWNS)
    os.close(before)
    os.chdir(here)


def test_containerds_options_are_told_from_others() -> None:
    rest, mapped = idmap.split_options(["ro", *OPTIONS, "lowerdir=/a"])
    assert (rest, mapped) == (["ro", "lowerdir=/a"], MAPPED)
    _, several = idmap.split_options(["uidmap=0:5:1,1:7:2", "gidmap=0:0:1"])
    assert several.uids == ((0, 5, 1), (1, 7, 2))


@pytest.mark.parametrize("options", [OPTIONS[:1], ("uidmap=", "gidmap="), ("uidmap=0:1", OPTIONS[1])])
def test_half_a_mapping_is_none(options: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument, match="rootfs: "):
        idmap.split_options(options)


@by_root
def test_a_user_namespace_has_the_mappings_and_nothing_in_it() -> None:
    async def look() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with idmap.user_namespace(MAPPED) as fd:
            assert os.readlink(f"/proc/self/fd/{fd}").startswith("user:[")
            assert os.fstat(fd).st_ino != os.stat("/proc/self/ns/user").st_ino
        with pytest.raises(InvalidArgument, match="gidMappings: the kernel does not take"):
            idmap.user_namespace(IdMappings(RANGES, (*RANGES, *RANGES))).__enter__()
        await until(lambda: len(os.listdir("/proc/self/fd")) == before)

    asyncio.run(look())


def test_a_host_that_starts_no_process_for_it_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idmap, "_MAKER", ["/no/such/program"])
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Unavailable, match="/no/such/program"):
        idmap.user_namespace(MAPPED).__enter__()
    assert os.listdir("/proc/self/fd") == before


@by_root
def test_a_volume_with_mapped_ids(tmp_path: Path, own_mounts: None) -> None:
    """Of one that is mounted below it only where that is asked for."""
    source, share = tmp_path / "source", tmp_path / "share"
    (source / "below").mkdir(parents=True)
    share.mkdir()
    system.mount("none", str(source / "below"), "tmpfs", 0, "mode=755")
    (source / "file").touch()
    entries = [
        SharedMount(f"mount{below}", str(source), False, True, "/volume", MAPPED, bool(below))
        for below in (0, 1)
    ]

    async def look() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with rootfs.bound(entries[0], share), rootfs.bound(entries[1], share):
            found = [[(share / entry.name / name).stat() for name in ("file", "below")] for entry in entries]
        owners = [[(about.st_uid, about.st_gid) for about in abouts] for abouts in found]
        assert owners == [[(300000, 400000), (0, 0)], [(300000, 400000), (300000, 400000)]]
        await until(lambda: len(os.listdir("/proc/self/fd")) == before)  # whoever made namespaces is reaped

    asyncio.run(look())


@by_root
def test_a_file_system_that_cannot_is_named(tmp_path: Path, own_mounts: None) -> None:
    entry = SharedMount("mount0", "/proc/sys", True, True, "/volume", MAPPED)

    async def look() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Unimplemented, match="/volume: source /proc/sys: its file system cannot"):
            rootfs.bound(entry, tmp_path).__enter__()
        await until(lambda: len(os.listdir("/proc/self/fd")) == before)

    asyncio.run(look())


@by_root
def test_an_overlay_of_layers_with_mapped_ids(tmp_path: Path, own_mounts: None) -> None:
    """They are what they were on disk, and nothing is left of how it was made."""
    names = ("one", "two", "upper", "work", "target", "links")
    one, two, upper, work, target, links = (tmp_path / name for name in names)
    for directory in (one, two, upper, work, target):
        directory.mkdir()
    system.mount("none", str(upper), "tmpfs", 0, "")  # which an overlay takes for one, whatever this disk is
    for name in ("upper", "work"):
        (upper / name).mkdir()
    for number, layer in enumerate((one, two)):
        (layer / f"file{number}").touch()
    options = [f"lowerdir={one}:{two}", f"upperdir={upper}/upper", f"workdir={upper}/work"]
    mounts = [Mount(type="overlay", source="overlay", options=[*OPTIONS, *options])]

    async def look() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with rootfs.mounted(mounts, target, links):
            for name in ("file0", "file1"):
                about = os.stat(target / name)
                assert (about.st_uid, about.st_gid) == (300000, 400000)
            os.chmod(target / "file0", 0o600)
            assert (upper / "upper/file0").stat().st_uid == 300000
            assert (one / "file0").stat().st_uid == 0
        assert sorted(os.listdir(tmp_path)) == sorted(names[:-1])
        with pytest.raises(CasemateError, match="with mapped IDs"):
            rootfs.mounted(
                [Mount(type="tmpfs", source="none", options=list(OPTIONS))], target, links
            ).__enter__()
        await until(lambda: len(os.listdir("/proc/self/fd")) == before)

    asyncio.run(look())
