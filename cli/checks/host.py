"""What the kernel and the machine offer: acceleration, vsock, tun, cgroups, IOMMU, memory."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

from cli.checks.result import CheckContext, Result, failure, ok, warning
from config.cpulist import numbers, ranges
from rpc.errors import CasemateError

SLOW_NAME_S = 0.5


def acceleration(context: CheckContext) -> Iterator[Result]:
    from shim.vm.accel import choose

    name = "acceleration"
    try:
        chosen = choose(context.settings.accel)
    except CasemateError as error:
        yield failure(name, f"{error.brief}: {error.details}", error.hint)
        return
    if chosen.kind == "kvm":
        yield ok(name, f"kvm: {chosen.reason}")
    else:
        yield warning(
            name,
            f"guests are emulated (tcg), 10 to 50 times slower: {chosen.reason}",
            "enable virtualization in the firmware; on a virtual machine, nested virtualization outside it",
        )


def landlock(_: CheckContext) -> Iterator[Result]:
    from shim.landlock import SINCE, version

    if found := version():
        lacks = [f"{what} (Linux {linux})" for since, linux, what in SINCE if found < since]
        more = f"; not kept from it: {', '.join(lacks)}" if lacks else ""
        yield ok("landlock", f"version {found}: QEMU reaches its own pod's files alone{more}")
    else:
        yield warning(
            "landlock",
            "the kernel has none: a QEMU that a guest has taken over reads what every user may read",
            "Linux 5.13 or newer, with landlock among lsm= (/sys/kernel/security/lsm)",
        )


def vsock(context: CheckContext) -> Iterator[Result]:
    yield _device(
        context,
        "/dev/vhost-vsock",
        "vhost_vsock",
        missing="missing: the agent is reached over virtio-serial",
        # With "vsock" in the config there is no other way.
        fatal=context.settings.transport == "vsock",
    )


def vhost_net(context: CheckContext) -> Iterator[Result]:
    yield _device(
        context, "/dev/vhost-net", "vhost_net", missing="missing: QEMU itself moves network packets, slower"
    )


def tun(context: CheckContext) -> Iterator[Result]:
    yield _device(context, "/dev/net/tun", "tun", missing="missing: pods have no network beyond loopback")


def _device(context: CheckContext, path: str, module: str, *, missing: str, fatal: bool = False) -> Result:
    if context.path(path).exists():
        return ok(path, "there")
    fix = f"modprobe {module}, and {module} in /etc/modules-load.d/casemate.conf for the next boot"
    return failure(path, missing, fix) if fatal else warning(path, missing, fix)


def cgroups(context: CheckContext) -> Iterator[Result]:
    base = context.path("/sys/fs/cgroup")
    name = "cgroups"
    if (base / "cgroup.controllers").exists():
        controllers = (base / "cgroup.controllers").read_text().split()
        lacking = [each for each in ("cpu", "memory", "pids") if each not in controllers]
        if lacking:
            yield warning(name, f"v2 without {', '.join(lacking)}", "see cgroup_disable= in /proc/cmdline")
        else:
            yield ok(name, "v2")
    elif (base / "memory").is_dir():
        kind = "v1 with an empty v2 beside it (hybrid)" if (base / "unified").is_dir() else "v1"
        yield ok(name, kind)
    else:
        yield failure(name, f"nothing is mounted at {base}", "mount -t cgroup2 none /sys/fs/cgroup")


def iommu(context: CheckContext) -> Iterator[Result]:
    name = "IOMMU"
    groups = context.path("/sys/kernel/iommu_groups")
    count = len(list(groups.iterdir())) if groups.is_dir() else 0
    if not count:
        yield warning(
            name,
            "no groups: no device can be given to a pod",
            "enable VT-d or AMD-Vi in the firmware, and intel_iommu=on where the kernel needs it",
        )
        return
    way = "iommufd and groups" if context.path("/dev/iommu").exists() else "groups (no /dev/iommu)"
    yield ok(name, f"{count} groups, by {way}")


def hugepages(context: CheckContext) -> Iterator[Result]:
    parts = []
    base = context.path("/sys/kernel/mm/hugepages")
    for directory in sorted(base.iterdir()) if base.is_dir() else []:
        total, free = (int((directory / file).read_text()) for file in ("nr_hugepages", "free_hugepages"))
        if total:
            parts.append(f"{directory.name.removeprefix('hugepages-')}: {free} of {total} free")
    yield ok("hugepages", "; ".join(parts) or "none reserved: guests have ordinary pages")


def dedicated_cpus(context: CheckContext) -> Iterator[Result]:
    """Whether those that the operator leaves to pods are there, in whole cores."""
    from vfio.offer import nodes

    name, listed = "dedicated CPUs", frozenset(numbers(context.settings.dedicated_cpus))
    if not listed:
        yield ok(name, "dedicated_cpus leaves none out: pods that want CPUs of their own have any")
        return
    cores = [core for node in nodes(str(context.path("/sys"))) for core in node.cores]
    whole = frozenset(cpu for core in cores if listed.issuperset(core) for cpu in core)
    if whole != listed:
        yield warning(
            name,
            f"{ranges(listed - whole)} of dedicated_cpus are not there, or not as whole cores: "
            "no pod is given them",
            "list whole cores: /sys/devices/system/cpu/cpu*/topology/core_cpus_list",
        )
    else:
        yield ok(name, f"{ranges(whole)}, in {sum(map(listed.issuperset, cores))} cores")


def memory(context: CheckContext) -> Iterator[Result]:
    """Whether the host has what the default profile asks for."""
    profile = context.settings.profiles[context.settings.default_profile]
    fields = dict(
        line.split(":", 1) for line in context.path("/proc/meminfo").read_text().splitlines() if ":" in line
    )
    total, free = (int(fields[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    found = f"{free >> 20} MiB free of {total >> 20}"
    needed = profile.memory_bytes
    if needed > total:
        yield failure(
            "memory",
            f"{found}, and profile {profile.name} wants {needed >> 20} MiB",
            f"profiles.{profile.name}.memory in the config",
        )
    elif needed > free:
        yield warning(
            "memory", f"{found}, and profile {profile.name} wants {needed >> 20} MiB", "free some memory"
        )
    else:
        yield ok("memory", found)


def host_name(context: CheckContext) -> Iterator[Result]:
    """libvirt asks for the host's own name at every start of a pod, and waits for the answer."""
    name = socket.gethostname()
    resolver = threading.Thread(target=_resolve, args=(name,), daemon=True)
    begun_s = time.monotonic()
    resolver.start()
    resolver.join(2 * SLOW_NAME_S)
    took_s = time.monotonic() - begun_s
    if took_s < SLOW_NAME_S:
        yield ok("host name", name)
    else:
        took = "no answer yet after" if resolver.is_alive() else "resolved in"
        yield warning(
            "host name",
            f"{name}: {took} {took_s:.1f} s, and every pod's start waits as long",
            f'"127.0.1.1 {name}" in /etc/hosts',
        )


def _resolve(name: str) -> None:
    with contextlib.suppress(OSError):  # that there is none is an answer too
        socket.getaddrinfo(name, None, flags=socket.AI_CANONNAME)


def root_user(context: CheckContext) -> Iterator[Result]:
    if os.geteuid() == 0:
        yield ok("user", "root")
    else:
        yield warning(
            "user", "not root: some of this cannot be seen, or looks worse than it is", "sudo casemate check"
        )
