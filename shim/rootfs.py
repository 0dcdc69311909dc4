"""A container's files on the host: its root file system and volumes, mounted where its guest is served them.

Mounts appear in the pod's own mount namespace only. It must not know how the guest gets at them.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from rpc.api.types import Mount
from rpc.errors import InvalidArgument, NotFound, Unimplemented
from shim import system
from shim.cleanup import remove_tree
from shim.namespaces import HostNamespaces
from shim.oci import UNMAPPED, IdMappings
from shim.spec import SharedMount

# Options of mount(8) that are flags of mount(2): what to set, what to clear.
_FLAGS: dict[str, tuple[int, int]] = {
    "defaults": (0, 0),
    "ro": (system.MS_RDONLY, 0),
    "rw": (0, system.MS_RDONLY),
    "nosuid": (system.MS_NOSUID, 0),
    "suid": (0, system.MS_NOSUID),
    "nodev": (system.MS_NODEV, 0),
    "dev": (0, system.MS_NODEV),
    "noexec": (system.MS_NOEXEC, 0),
    "exec": (0, system.MS_NOEXEC),
    "sync": (system.MS_SYNCHRONOUS, 0),
    "async": (0, system.MS_SYNCHRONOUS),
    "dirsync": (system.MS_DIRSYNC, 0),
    "noatime": (system.MS_NOATIME, 0),
    "atime": (0, system.MS_NOATIME),
    "nodiratime": (system.MS_NODIRATIME, 0),
    "diratime": (0, system.MS_NODIRATIME),
    "relatime": (system.MS_RELATIME, 0),
    "norelatime": (0, system.MS_RELATIME),
    "strictatime": (system.MS_STRICTATIME, 0),
    "nostrictatime": (0, system.MS_STRICTATIME),
    "bind": (system.MS_BIND, 0),
    "rbind": (system.MS_BIND | system.MS_REC, 0),
}
_PROPAGATION = frozenset(
    f"{prefix}{kind}" for prefix in ("", "r") for kind in ("private", "shared", "slave", "unbindable")
)
# In the path of what containerd 2.2's mount manager has mounted for a container: layers of erofs.
MANAGED = "/io.containerd.mount-manager."
LOOP = "loop"
# mount(2) takes one page of options, and an overlay of many layers has longer ones.
MOST_DATA_BYTES = os.sysconf("SC_PAGE_SIZE") - 1


def split_options(options: Sequence[str]) -> tuple[int, str]:
    """(flags, data) for mount(2). Propagation options are the guest's business, as the mount is private here.

    Raises Unimplemented for an option that only mount(8) understands.
    """
    flags = 0
    data: list[str] = []
    for option in options:
        if option in _FLAGS:
            added, removed = _FLAGS[option]
            flags = (flags | added) & ~removed
        elif option == LOOP or option.startswith("X-"):
            raise Unimplemented(
                f"rootfs: mount option {option}", hint="use the overlayfs or native snapshotter"
            )
        elif option not in _PROPAGATION:
            data.append(option)
    return flags, ",".join(data)


def mounts_of(mounts: Sequence[Mount], bundle: str, root: str) -> Sequence[Mount]:
    """What makes the root file system.

    A client that has no snapshot (`ctr run --rootfs`) sends no mounts, and means root.path of its
    config.json, relative to the bundle. Raises InvalidArgument if there is neither.
    """
    if mounts:
        return mounts
    if not root:
        raise InvalidArgument("rootfs: neither mounts nor root.path")
    return [Mount(type="bind", source=os.path.join(bundle, root), options=["rbind", "rw"])]


@contextmanager
def mounted(
    mounts: Sequence[Mount], target: Path, links: Path, host: HostNamespaces | None = None
) -> Iterator[None]:
    """containerd's mounts of a snapshot, in their order, at target; unmounted in the other order.

    links: a directory for short names of long lists of layers. host: see bound(). Raises InvalidArgument with
    the kernel's reason.
    """
    done = 0
    try:
        with _in_parts(mounts, Path(f"{links}.parts"), links, host) as whole:
            for mount in whole:
                if mount.target:
                    # The image could have put a link there, and the host would follow it.
                    raise Unimplemented(f"rootfs: a mount at {mount.target} within it")
                with _brought_here(mount, Path(f"{links}.managed"), host) as ready:
                    _mount(ready, str(target), links)
                done += 1
        yield
    finally:
        for _ in range(done):
            system.umount(str(target), system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
        remove_tree(links)


@contextmanager
def _in_parts(
    mounts: Sequence[Mount], directory: Path, links: Path, host: HostNamespaces | None
) -> Iterator[Sequence[Mount]]:
    """What remains to be mounted, with the rest mounted below a directory. An overlay holds what it was made
    of: that need not stay.
    """
    if not any("/" in mount.type for mount in mounts):
        yield mounts
        return
    from shim import parts  # few root file systems are made of others

    first, rest = parts.split(mounts)
    places = [directory / str(number) for number in range(len(first))]
    try:
        for at, (part, place) in enumerate(zip(first, places, strict=True)):
            place.mkdir(parents=True)
            wanted = parts.resolved(part, first[:at], places[:at])
            with _brought_here(wanted, Path(f"{links}.managed"), host) as ready:
                _mount(ready, str(place), links)
        yield [parts.resolved(mount, first, places) for mount in rest]
    finally:
        remove_tree(directory)


@contextmanager
def _brought_here(mount: Mount, directory: Path, host: HostNamespaces | None) -> Iterator[Mount]:
    """The same with other names, for as long as it takes to mount it, of what the mount manager has mounted.

    That is mounted after this pod began, and comes here by itself only if the host's mounts are shared: else
    there would be empty directories by these names. Raises InvalidArgument, and Unimplemented for a writable
    layer among them, which has to be on one mount with its working directory.
    """
    if not any(MANAGED in text for text in (mount.source, *mount.options)) or host is None:
        yield mount
        return
    with ExitStack() as undo:
        directory.mkdir(mode=0o700)
        undo.callback(directory.rmdir)

        def brought(path: str) -> str:
            if MANAGED not in path:
                return path
            place = directory / str(len(os.listdir(directory)))
            place.mkdir(mode=0o700)
            undo.callback(place.rmdir)
            try:
                tree = host.run(partial(system.clone_tree, path, recursive=False))
                system.attach_sealed(tree, str(place), recursive=False, read_only=True)
            except OSError as error:
                raise InvalidArgument(f"rootfs: cannot mount {path}", error.strerror) from error
            undo.callback(system.umount, str(place), system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
            return str(place)

        options = []
        for option in mount.options:
            name, _, value = option.partition("=")
            if name in ("upperdir", "workdir") and MANAGED in value:
                raise Unimplemented(
                    f"rootfs: {option}: a writable layer that containerd has mounted",
                    hint="use the erofs snapshotter without default_size, or overlayfs",
                )
            if name == "lowerdir":
                option = f"lowerdir={':'.join(map(brought, value.split(':')))}"
            options.append(option)
        yield Mount(type=mount.type, source=brought(mount.source), options=options)


def _mount(mount: Mount, target: str, links: Path) -> None:
    if "/" in mount.type:  # of containerd's mount manager
        raise Unimplemented(
            f"rootfs: mount type {mount.type}", hint="use the overlayfs or native snapshotter"
        )
    options, mapped = _split_mapping(mount.options)
    if mapped and mount.type == "overlay":
        from shim import idmap

        with idmap.mapped_layers(options, mapped, Path(f"{links}.mapped")) as layers:
            _mount(Mount(type=mount.type, source=mount.source, options=layers), target, links)
        return
    flags, data = split_options([option for option in options if option != LOOP])
    if mapped and not flags & system.MS_BIND:
        raise Unimplemented(
            f"rootfs: {mount.type} with mapped IDs", hint="the overlayfs snapshotter's can be had so"
        )
    short: Path | None = None
    if len(data) > MOST_DATA_BYTES:
        data, short = shorten_layers(data, links), links
    if len(data) > MOST_DATA_BYTES:
        raise Unimplemented(f"rootfs: {len(data)} bytes of mount options; the kernel takes {MOST_DATA_BYTES}")
    try:
        if flags & system.MS_BIND:
            recursive = bool(flags & system.MS_REC)
            tree = system.clone_tree(mount.source, recursive=recursive)
            if mapped:
                from shim import idmap

                idmap.map_tree(tree, mapped, f"rootfs: {mount.source}", recursive=recursive)
            read_only = bool(flags & system.MS_RDONLY)
            system.attach_sealed(tree, target, recursive=recursive, read_only=read_only)
            return
        # Nothing on the host executes from it or opens its devices; the guest's own mount has its own flags.
        flags |= system.MS_NOSUID | system.MS_NODEV
        with ExitStack() as held:
            source = mount.source
            if LOOP in mount.options:
                from shim import parts

                read_only = bool(flags & system.MS_RDONLY)
                source = held.enter_context(parts.loop_device(source, read_only=read_only))
            held.enter_context(_working_in(short))
            system.mount(source, target, mount.type, flags, data)
    except OSError as error:
        raise InvalidArgument(f"rootfs: cannot mount {mount.type} {mount.source}", error.strerror) from error


def _split_mapping(options: Sequence[str]) -> tuple[Sequence[str], IdMappings]:
    """Without those of containerd's that map IDs, and what they say. Raises InvalidArgument."""
    if not any(option.startswith(("uidmap=", "gidmap=")) for option in options):
        return options, UNMAPPED
    from shim import idmap  # few containers have a user namespace

    return idmap.split_options(options)


def shorten_layers(data: str, links: Path) -> str:
    """The same options with every layer named by a link in `links`, relative to it: 500 layers fit a page."""
    remove_tree(links)  # of an earlier mount by the same name
    links.mkdir(mode=0o700)
    parts = []
    for option in data.split(","):
        if option.startswith("lowerdir="):
            layers = option.removeprefix("lowerdir=").split(":")
            for number, layer in enumerate(layers):
                (links / str(number)).symlink_to(layer)
            option = "lowerdir=" + ":".join(str(number) for number in range(len(layers)))
        parts.append(option)
    return ",".join(parts)


@contextmanager
def _working_in(directory: Path | None) -> Iterator[None]:
    """mount(2) takes relative names from the working directory; nothing else of the shim's is relative."""
    if directory is not None:
        os.chdir(directory)
    try:
        yield
    finally:
        if directory is not None:
            os.chdir("/")


@contextmanager
def bound(entry: SharedMount, directory: Path, host: HostNamespaces | None = None) -> Iterator[None]:
    """One host file or directory, bound to a name below the share.

    What another mount has below a source comes along if the client said rbind. host: where the source is
    looked up. What was mounted there since this pod began (a kubelet mounts a container's subPath when it
    makes that) comes here by itself only if the host's mounts are shared.
    """
    clone = partial(system.clone_tree, entry.source, recursive=entry.recursive)
    target = directory / entry.name
    try:
        if os.path.isdir(entry.source):
            target.mkdir(mode=0o700)
        else:
            target.touch(mode=0o600)
        tree = clone() if host is None else host.run(clone)
        if entry.mapped:
            from shim import idmap

            what = f"mount {entry.destination}: source {entry.source}"
            idmap.map_tree(tree, entry.mapped, what, recursive=entry.maps_below)
        # Read-only not only in the guest: a guest's root could mount it again without the option.
        system.attach_sealed(tree, str(target), recursive=entry.recursive, read_only=entry.read_only)
    except FileNotFoundError as error:
        raise NotFound(f"mount source {entry.source} does not exist") from error
    try:
        yield
    finally:
        system.umount(str(target), system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
