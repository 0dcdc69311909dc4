"""The pod's network namespace: entered by the shim before anything else of the pod exists.

QEMU and the anchors inherit it. It makes nothing in a namespace that it was given, so that a second pod, or
a second start, finds it as it was.
"""

import os

from rpc.errors import InvalidArgument
from shim import oci, spec, system


def open_pod_network(document: object) -> int | None:
    """A descriptor of the namespace that the spec names; None where the pod is to have one of its own.

    From a thread in the namespaces that containerd is in. Raises InvalidArgument if the path is not a network
    namespace, Unimplemented for the host's network.
    """
    wanted = oci.parse(document if document is not None else {})
    spec.refuse_host_access(wanted)
    namespace = wanted.namespace("network")
    assert namespace is not None  # refuse_host_access() has seen to it
    if not namespace.path:
        return None
    try:
        fd = os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgument(f"network namespace {namespace.path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise InvalidArgument(f"network namespace {namespace.path!r}: {error}") from error
    try:
        if not is_network(fd):
            raise InvalidArgument(f"network namespace {namespace.path}: it is none")
        if _is_own(fd):
            raise InvalidArgument(
                f"network namespace {namespace.path} is the host's own",
                hint="a pod in the host's network cannot be isolated in a VM",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_network(fd: int) -> bool:
    """Whether it is a network namespace's descriptor (ioctl_ns(2), NS_GET_NSTYPE)."""
    import fcntl

    try:
        return fcntl.ioctl(fd, 0xB703) == system.CLONE_NEWNET
    except OSError:
        return False


def enter_network(fd: int | None) -> None:
    """A new one with a loopback that is up, where there is none to enter. Closes the descriptor."""
    if fd is None:
        make_network()
        return
    try:
        enter(fd)
    finally:
        os.close(fd)


def enter(fd: int) -> None:
    """The calling thread alone. Raises OSError."""
    system.setns(fd, system.CLONE_NEWNET)


def make_network() -> None:
    """A new one, with a loopback that is up."""
    system.unshare(system.CLONE_NEWNET)
    _raise_loopback()


def _is_own(fd: int) -> bool:
    """Whether it is the one that the calling thread is in, before it enters any or again: containerd's."""
    ours, theirs = os.stat("/proc/thread-self/ns/net"), os.fstat(fd)
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)


def _raise_loopback() -> None:
    """SIOCSIFFLAGS with IFF_UP (netdevice(7)): pyroute2 would cost the start 100 ms of imports for it."""
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("16sH14x", b"lo", 0x1))
