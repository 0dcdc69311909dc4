"""Which of the host's files QEMU may reach, beside what its user may: those that a machine is made of.

What breaks out of a guest into its QEMU is that user; without this it reads whatever everybody may read.
"""

from collections.abc import Iterable, Mapping

from shim.landlock import ALL, READ, RUN, USE, Right

# Programs and libraries; what the C library reads to start one and to look up a user; the pod's processes.
_SYSTEM: Mapping[str, Right] = {
    **dict.fromkeys(("/usr", "/bin", "/sbin", "/lib", "/lib64"), RUN),
    **dict.fromkeys(("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/localtime", "/etc/timezone"), READ),
    **dict.fromkeys(("/etc/nsswitch.conf", "/etc/passwd", "/etc/group"), READ),
    **dict.fromkeys(("/etc/hosts", "/etc/host.conf", "/etc/resolv.conf", "/etc/gai.conf"), READ),
    "/proc": READ | Right.WRITE_FILE,
    "/sys": READ,
}
_NODES = (
    *("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/ptmx", "/dev/kvm"),
    *("/dev/net/tun", "/dev/vhost-net", "/dev/vhost-vsock", "/dev/vfio", "/dev/iommu", "/dev/sgx_vepc"),
)


def of(directory: str, emulator: str, readable: Iterable[str], more: Iterable[str]) -> dict[str, Right]:
    """directory: the pod's, where it may do everything, as with `more`. readable: of images and firmware."""
    return {
        **_SYSTEM,
        **dict.fromkeys(_NODES, USE),
        **dict.fromkeys(readable, READ),
        emulator: RUN,
        directory: ALL,
        **dict.fromkeys(more, ALL),
    }
