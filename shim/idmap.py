"""Mounts on which IDs are others than on disk: the kernel's ID-mapped mounts (mount_setattr(2), Linux 5.12).

A mapping is told to the kernel by a user namespace that has it. It must not know what is mounted, nor why.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rpc.errors import InvalidArgument, Unavailable, Unimplemented, printable
from shim import system
from shim.helper import spawn
from shim.oci import IdMappings

_UID, _GID = "uidmap=", "gidmap="
_WORDS_BYTES = 1024
# A program in a new user namespace that answers when it is there, and ends with its input.
_MAKER = ("/usr/bin/unshare", "--user", "/bin/cat")


def split_options(options: Sequence[str]) -> tuple[list[str], IdMappings]:
    """containerd's uidmap= and gidmap= (INSIDE:OUTSIDE:SIZE,...) of a mount, and the other options.

    Raises InvalidArgument for what is no mapping, or one of the two alone.
    """
    found: dict[str, tuple[tuple[int, int, int], ...]] = {_UID: (), _GID: ()}
    rest = []
    for option in options:
        prefix = next((each for each in found if option.startswith(each)), None)
        if prefix is None:
            rest.append(option)
        else:
            found[prefix] = tuple(_parsed(line, option) for line in option.removeprefix(prefix).split(","))
    if bool(found[_UID]) != bool(found[_GID]):
        raise InvalidArgument(f"rootfs: {_UID} and {_GID} go together")
    return rest, IdMappings(found[_UID], found[_GID])


def _parsed(line: str, option: str) -> tuple[int, int, int]:
    words = line.split(":")
    if len(words) != 3 or not all(word.isascii() and word.isdigit() for word in words):
        raise InvalidArgument(f"rootfs: mount option {option}: not INSIDE:OUTSIDE:SIZE")
    inside, outside, size = map(int, words)
    return inside, outside, size


@contextmanager
def user_namespace(mapped: IdMappings) -> Iterator[int]:
    """A descriptor of a user namespace with these mappings, in which nothing is. From a running event loop.

    Raises InvalidArgument for mappings that the kernel does not take, Unavailable where it makes none.
    """
    with ExitStack() as undo:
        heard, says = os.pipe2(os.O_CLOEXEC)
        undo.callback(os.close, heard)
        try:
            told, tells = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, tells)
            try:
                maker = spawn("user namespace", _MAKER, fds={0: told, 1: says, 2: says})
            finally:
                os.close(told)
        finally:
            os.close(says)
        undo.callback(maker.kill)
        os.write(tells, b".")
        if (said := os.read(heard, _WORDS_BYTES)) != b".":
            words = printable(said.decode("utf-8", "replace").strip())
            raise Unavailable("the host gives no user namespace, which mapped IDs take", words)
        for kind, lines in (("uid", mapped.uids), ("gid", mapped.gids)):
            text = "".join(f"{inside} {outside} {size}\n" for inside, outside, size in lines)
            try:
                with open(f"/proc/{maker.pid}/{kind}_map", "wb", buffering=0) as file:
                    file.write(text.encode())
            except OSError as error:
                raise InvalidArgument(
                    f"{kind}Mappings: the kernel does not take {text!r}", error.strerror
                ) from error
        fd = os.open(f"/proc/{maker.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, fd)
        yield fd


def map_tree(tree: int, mapped: IdMappings, what: str, *, recursive: bool) -> None:
    """Of a mount that is attached nowhere (system.clone_tree()), closed if it raises. what: for an error.

    Raises Unimplemented where a file system cannot have it, and as user_namespace().
    """
    try:
        with user_namespace(mapped) as users:
            _map(tree, users, what, recursive=recursive)
    except BaseException:
        os.close(tree)
        raise


def _map(tree: int, users: int, what: str, *, recursive: bool) -> None:
    try:
        system.map_ids(tree, users, recursive=recursive)
    except OSError as error:
        raise Unimplemented(
            f"{what}: its file system cannot be mounted with mapped IDs",
            error.strerror,
            hint="this kernel's ext4, XFS, btrfs and, since 6.3, tmpfs can; overlay and FUSE cannot",
        ) from error


@contextmanager
def mapped_layers(options: Sequence[str], mapped: IdMappings, directory: Path) -> Iterator[list[str]]:
    """An overlay's options with each lower layer's IDs mapped: mounted below directory until it is mounted,
    which keeps what it was made of.
    """
    with ExitStack() as undo:
        users = undo.enter_context(user_namespace(mapped))
        directory.mkdir(mode=0o700)
        undo.callback(directory.rmdir)

        def layer(path: str) -> str:
            place = directory / str(len(os.listdir(directory)))
            place.mkdir(mode=0o700)
            undo.callback(place.rmdir)
            try:
                tree = system.clone_tree(path, recursive=False)
            except OSError as error:
                raise InvalidArgument(f"rootfs: cannot mount {path}", error.strerror) from error
            try:
                _map(tree, users, f"rootfs: layer {path}", recursive=False)
            except BaseException:
                os.close(tree)
                raise
            system.attach_sealed(tree, str(place), recursive=False, read_only=True)
            undo.callback(system.umount, str(place), system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
            return str(place)

        found = []
        for option in options:
            name, equals, value = option.partition("=")
            found.append(
                f"{name}={':'.join(map(layer, value.split(':')))}"
                if name == "lowerdir" and equals
                else option
            )
        yield found
