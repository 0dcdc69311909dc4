"""A container's mounts, as far as they are decided without mounting: options, flags, layers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.api.types import Mount
from rpc.errors import InvalidArgument, Unimplemented
from shim import rootfs, system
from shim.rootfs import mounted, mounts_of, shorten_layers, split_options

# Where links are: RUN/pods/KEY/l0 with the RUN of every host.
USUAL = "/run/casemate/pods/0123456789abcdef/l0"


@pytest.fixture
def links() -> Iterator[Path]:
    """A directory whose path is as long as the usual one."""
    base = tempfile.mkdtemp(dir="/tmp")
    path = Path(base) / ("l" * (len(USUAL) - len(base) - 1))
    assert len(str(path)) == len(USUAL)
    yield path
    shutil.rmtree(base)


@pytest.mark.parametrize(
    ("options", "flags", "data"),
    [
        ([], 0, ""),
        (["ro", "nosuid", "nodev"], system.MS_RDONLY | system.MS_NOSUID | system.MS_NODEV, ""),
        (["ro", "rw"], 0, ""),
        (["rw", "ro"], system.MS_RDONLY, ""),
        (["nosuid", "suid", "noexec", "exec"], 0, ""),
        (["rbind", "rprivate"], system.MS_BIND | system.MS_REC, ""),
        (["bind", "rslave", "ro"], system.MS_BIND | system.MS_RDONLY, ""),
        (["defaults", "noatime"], system.MS_NOATIME, ""),
        (["workdir=/w", "upperdir=/u", "lowerdir=/a:/b"], 0, "workdir=/w,upperdir=/u,lowerdir=/a:/b"),
        (["index=off", "ro", "userxattr"], system.MS_RDONLY, "index=off,userxattr"),
    ],
)
def test_options_are_flags_or_data(options: list[str], flags: int, data: str) -> None:
    assert split_options(options) == (flags, data)


@pytest.mark.parametrize("option", ["loop", "X-containerd.mkdir.path=/x", "X-anything"])
def test_options_of_mount_8_alone_are_refused_by_name(option: str) -> None:
    with pytest.raises(Unimplemented, match=f"mount option {option}") as caught:
        split_options(["ro", option])
    assert caught.value.hint


@pytest.mark.parametrize(("path", "source"), [("rootfs", "/bundle/rootfs"), ("/srv/root", "/srv/root")])
def test_without_a_snapshot_it_is_the_path_in_the_spec(path: str, source: str) -> None:
    (mount,) = mounts_of([], "/bundle", path)
    assert (mount.type, mount.source, mount.options) == ("bind", source, ["rbind", "rw"])


def test_a_snapshots_mounts_are_all_there_is() -> None:
    snapshot = [Mount(type="overlay", source="overlay", options=["lowerdir=/a:/b"])]
    assert mounts_of(snapshot, "/bundle", "rootfs") is snapshot


def test_neither_mounts_nor_a_path_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="neither"):
        mounts_of([], "/bundle", "")


@given(st.lists(st.text(min_size=1, max_size=20)))
def test_options_are_taken_or_refused_and_none_gets_lost(options: list[str]) -> None:
    try:
        _, data = split_options(options)
    except Unimplemented:
        return
    known = {*rootfs._FLAGS, *rootfs._PROPAGATION}
    assert data == ",".join(option for option in options if option not in known)


@pytest.mark.parametrize("kind", ["mkfs/ext4", "verity/erofs"])
def test_mounts_that_containerd_should_have_made_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    mounts = [Mount(type=kind, source="overlay")]
    with pytest.raises(Unimplemented, match=f"mount type {kind}"), mounted(mounts, tmp_path, tmp_path / "l"):
        pass


def test_without_mounts_the_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    with mounted([], tmp_path, tmp_path / "l"):
        pass
    assert list(tmp_path.iterdir()) == []


def overlay(layers: list[Path]) -> str:
    return "index=off,workdir=/w,upperdir=/u,lowerdir=" + ":".join(map(str, layers))


def test_layers_keep_their_order_and_are_the_same_directories(tmp_path: Path, links: Path) -> None:
    layers = [tmp_path / f"snapshots/{number}/fs" for number in range(100)]
    for layer in layers:
        layer.mkdir(parents=True)
    short = shorten_layers(overlay(layers), links)
    *others, lower = short.split(",")
    assert others == ["index=off", "workdir=/w", "upperdir=/u"]
    names = lower.removeprefix("lowerdir=").split(":")
    assert [(links / name).resolve() for name in names] == layers


@pytest.mark.parametrize("count", [60, 128, 300])
def test_shortened_options_fit_into_what_the_kernel_takes(links: Path, count: int) -> None:
    """It cuts what is longer, in silence: layers would be missing. The kernel itself takes 500 layers."""
    root = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots"
    layers = [Path(root) / str(number) / "fs" for number in range(10_000, 10_000 + count)]
    assert len(overlay(layers)) > rootfs.MOST_DATA_BYTES
    assert len(shorten_layers(overlay(layers), links)) <= rootfs.MOST_DATA_BYTES


def test_two_containers_of_one_pod_can_both_have_many_layers(tmp_path: Path, links: Path) -> None:
    """The same directory for both: a container was deleted, and the next one counts from there."""
    layers = [Path(f"/layers/{number}") for number in range(100)]
    assert shorten_layers(overlay(layers), links) == shorten_layers(overlay(layers), links)
