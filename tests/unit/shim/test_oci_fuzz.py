"""Whole documents by the OCI runtime specification, each field what it declares or anything at all: whoever
reads one of them understands it, or refuses it in an error of ours.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from config.sources import read_defaults
from rpc.api import agent as api
from rpc.errors import CasemateError
from shim import (
    blockdevices,
    bootstrap,
    bundle,
    cgroup,
    devicewishes,
    hookrun,
    idmap,
    oci,
    resources,
    sandbox,
    spec,
    users,
    wants,
)
from tests.unit.shim.pods import config

Strategy = st.SearchStrategy[Any]

TEXT = st.text(st.characters(codec=None), max_size=8)
HUGE = 10**400
NUMBERS = st.sampled_from((0, 1, -1, 3, 8, 229, 1 << 31, 1 << 32, 1 << 63, HUGE, -HUGE)) | st.integers()
NOISE = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.floats()
    | TEXT
    | st.lists(NUMBERS | TEXT, max_size=2)
    | st.dictionaries(TEXT, NUMBERS | TEXT, max_size=2)
)


def often(good: Strategy) -> Strategy:
    """What is declared, and one time in ten anything."""
    return st.integers(0, 9).flatmap(lambda number: good if number else NOISE)


def words(*known: str) -> Strategy:
    return often(st.sampled_from(known) | TEXT)


TEXTS, FLAG, NUMBER = often(TEXT), often(st.booleans()), often(NUMBERS)
PATH = words("/", "/dev/null", "/dev/shm", "/nowhere", "rootfs", "/proc/1/ns/net", "..", "/\0", "/\ud800")


def many(one: Strategy) -> Strategy:
    return often(st.lists(one, max_size=3))


def named(one: Strategy, *known: str) -> Strategy:
    return often(st.dictionaries(st.sampled_from(known) | TEXT if known else TEXT, one, max_size=3))


def fields(**declared: Strategy) -> Strategy:
    """An object with some of them. A name that Python keeps for itself ends in "_"."""
    return often(
        st.fixed_dictionaries({}, optional={name.rstrip("_"): each for name, each in declared.items()})
    )


# github.com/opencontainers/runtime-spec, 1.2: config.md and config-linux.md
IDS = many(fields(containerID=NUMBER, hostID=NUMBER, size=NUMBER))
CAPABILITIES = many(words("CAP_SYS_ADMIN", "CAP_NET_RAW", "CAP_NONE"))
PROCESS = fields(
    terminal=FLAG,
    consoleSize=fields(height=NUMBER, width=NUMBER),
    cwd=PATH,
    env=many(words("PATH=/bin", "A", "=", "A=\0")),
    args=many(words("sh", "-c", "true")),
    commandLine=TEXTS,
    rlimits=many(fields(type=words("RLIMIT_NOFILE", "RLIMIT_X"), hard=NUMBER, soft=NUMBER)),
    apparmorProfile=TEXTS,
    capabilities=fields(
        bounding=CAPABILITIES,
        effective=CAPABILITIES,
        inheritable=CAPABILITIES,
        permitted=CAPABILITIES,
        ambient=CAPABILITIES,
    ),
    noNewPrivileges=FLAG,
    oomScoreAdj=often(st.integers(-1001, 1001) | NUMBERS),
    scheduler=fields(policy=words("SCHED_OTHER", "SCHED_FIFO"), nice=NUMBER, priority=NUMBER),
    selinuxLabel=TEXTS,
    ioPriority=fields(class_=words("IOPRIO_CLASS_IDLE"), priority=NUMBER),
    execCPUAffinity=fields(initial=TEXTS, final=TEXTS),
    user=fields(uid=NUMBER, gid=NUMBER, umask=NUMBER, additionalGids=many(NUMBER), username=TEXTS),
)
MOUNT = fields(
    destination=words("/mnt", "/dev/shm", "/proc", "/sys", "/dev/mqueue", "mnt", "/"),
    type=words("bind", "tmpfs", "proc", "sysfs", "mqueue", "cgroup", "ext4", "nfs"),
    source=PATH,
    options=many(
        words("rbind", "bind", "ro", "nosuid", "rshared", "idmap", "ridmap", "size=64k", "mode=1777")
    ),
    uidMappings=IDS,
    gidMappings=IDS,
)
HOOK = fields(path=PATH, args=many(TEXTS), env=many(words("A=1", "A")), timeout=NUMBER)
HOOKS = fields(
    prestart=many(HOOK),
    createRuntime=many(HOOK),
    createContainer=many(HOOK),
    startContainer=many(HOOK),
    poststart=many(HOOK),
    poststop=many(HOOK),
)
BY_DEVICE = many(fields(major=NUMBER, minor=NUMBER, weight=NUMBER, leafWeight=NUMBER, rate=NUMBER))
RESOURCES = fields(
    devices=many(
        fields(
            allow=FLAG, type=words("a", "b", "c"), major=NUMBER, minor=NUMBER, access=words("rwm", "r", "w")
        )
    ),
    memory=fields(
        limit=NUMBER,
        reservation=NUMBER,
        swap=NUMBER,
        kernel=NUMBER,
        kernelTCP=NUMBER,
        swappiness=NUMBER,
        disableOOMKiller=FLAG,
        useHierarchy=FLAG,
        checkBeforeUpdate=FLAG,
    ),
    cpu=fields(
        shares=NUMBER,
        quota=NUMBER,
        burst=NUMBER,
        period=NUMBER,
        realtimeRuntime=NUMBER,
        realtimePeriod=NUMBER,
        cpus=words("0-1", "0"),
        mems=words("0"),
        idle=NUMBER,
    ),
    pids=fields(limit=NUMBER),
    blockIO=fields(
        weight=NUMBER,
        leafWeight=NUMBER,
        weightDevice=BY_DEVICE,
        throttleReadBpsDevice=BY_DEVICE,
        throttleWriteBpsDevice=BY_DEVICE,
        throttleReadIOPSDevice=BY_DEVICE,
        throttleWriteIOPSDevice=BY_DEVICE,
    ),
    hugepageLimits=many(fields(pageSize=words("2MB"), limit=NUMBER)),
    network=fields(classID=NUMBER, priorities=many(fields(name=TEXTS, priority=NUMBER))),
    rdma=named(fields(hcaHandles=NUMBER, hcaObjects=NUMBER)),
    unified=named(TEXTS, "cpuset.cpus", "memory.max"),
)
SECCOMP = fields(
    defaultAction=words("SCMP_ACT_ERRNO"),
    defaultErrnoRet=NUMBER,
    architectures=many(words("SCMP_ARCH_X86_64")),
    flags=many(TEXTS),
    listenerPath=PATH,
    listenerMetadata=TEXTS,
    syscalls=many(
        fields(
            names=many(TEXTS),
            action=words("SCMP_ACT_ALLOW"),
            errnoRet=NUMBER,
            args=many(fields(index=NUMBER, value=NUMBER, valueTwo=NUMBER, op=words("SCMP_CMP_EQ"))),
        )
    ),
)
LINUX = fields(
    devices=many(
        fields(
            type=words("c", "b", "u", "p"),
            path=words("/dev/null", "/dev/sda", "/dev/fuse", "/dev/vfio/1", "x"),
            major=NUMBER,
            minor=NUMBER,
            fileMode=NUMBER,
            uid=NUMBER,
            gid=NUMBER,
        )
    ),
    uidMappings=IDS,
    gidMappings=IDS,
    sysctl=named(TEXTS, "net.ipv4.ip_forward", "kernel.shm_rmid_forced"),
    cgroupsPath=words("/a/b", "a-b.slice:x:y", "system.slice:x:y", "../..", ":::", "-.slice:a:b"),
    namespaces=many(fields(type=words("pid", "user", "network", "mount", "time"), path=PATH)),
    resources=RESOURCES,
    rootfsPropagation=words("private", "shared"),
    seccomp=SECCOMP,
    maskedPaths=many(PATH),
    readonlyPaths=many(PATH),
    mountLabel=TEXTS,
    personality=fields(domain=words("LINUX"), flags=many(TEXTS)),
    intelRdt=fields(closID=TEXTS, l3CacheSchema=TEXTS, memBwSchema=TEXTS, enableCMT=FLAG, enableMBM=FLAG),
    timeOffsets=named(fields(secs=NUMBER, nanosecs=NUMBER), "boottime", "monotonic"),
    netDevices=named(fields(name=TEXTS)),
)
ANNOTATIONS = (
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri.sandbox-memory",
    "io.kubernetes.cri.sandbox-cpu-quota",
    "io.kubernetes.cri.sandbox-cpu-period",
    "io.kubernetes.cri.sandbox-namespace",
    "io.kubernetes.cri.sandbox-name",
    "dev.casemate/devices",
    "dev.casemate/vcpus",
    "dev.casemate/memory",
    "dev.casemate/profile",
)
DECLARED: dict[str, Strategy] = {
    "ociVersion": TEXTS,
    "process": PROCESS,
    "root": fields(path=PATH, readonly=FLAG),
    "hostname": TEXTS,
    "domainname": TEXTS,
    "mounts": many(MOUNT),
    "hooks": HOOKS,
    "annotations": named(
        words("sandbox", "container", "1", "-1", "x", "9" * 400, "count=2,kind=gpu", "2Gi"), *ANNOTATIONS
    ),
    "linux": LINUX,
    "vm": fields(hypervisor=fields(path=PATH)),
}
WHOLE = st.fixed_dictionaries({}, optional=DECLARED)
SETTINGS = read_defaults().settings.replace(allowed_annotations=ANNOTATIONS[-4:])


def over(base: Any, changes: Any) -> Any:
    """What changes says, else what base does: so that more than the first refusal is met."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return {**base, **{name: over(base.get(name), value) for name, value in changes.items()}}


def joined(document: Any) -> None:
    bootstrap.group_of(document)
    bootstrap.network_of_a_process(document)
    bootstrap.refuse_without_pod(document, "web", "web")
    bundle.is_containers(document)


def for_guest(document: Any) -> None:
    oci.encode(spec.for_guest(oci.parse(document), "web").document)


def of_sandbox(document: Any) -> None:
    parsed = oci.parse(document)
    spec.for_guest(parsed, "web")
    sandbox.pod_request(parsed, "web", sandbox.shm_of(parsed)).encode()
    sandbox.kubelet_pod(parsed)
    sandbox.furnished(parsed, sandbox.Siblings(gives={"/etc/hosts": "/nowhere"}))


def sized(document: Any) -> None:
    wanted = wants.wants_of(document, SETTINGS, "default", "web")
    resources.beyond(sandbox.pod_limits(oci.parse(document)), wanted.profile)
    api.HelloRequest(hostname=wanted.hostname).encode()


def updated(document: Any) -> None:
    linux = document.get("linux")
    asked = linux.get("resources") if isinstance(linux, dict) else None
    given = oci.decode(json.dumps(asked).encode(), "linux.resources")
    resources.for_guest(given)
    resources.beyond(oci.limits(given), SETTINGS.profiles["default"])


def devices(document: Any) -> None:
    parsed = oci.parse(document)
    for each in blockdevices.asked_for(parsed):
        os.makedev(each.major, each.minor)
        api.Disk(path=each.path, mode=each.mode, uid=each.uid, gid=each.gid).encode()
    wishes = devicewishes.wishes_of(spec.as_asked(parsed))
    if wishes.text:
        devicewishes.parse(wishes.text)


def hooks(document: Any) -> None:
    parsed = oci.parse(document)
    json.dumps(hookrun.state_of(parsed, "web", "/bundle", "stopped", 0))


def the_rest(document: Any) -> None:
    parsed = oci.parse(document)
    oci.oom_score(parsed)
    users.request(parsed.id_mappings).encode()
    cgroup.parent_of(cgroup.named(document))
    for mount in parsed.mounts:
        idmap.split_options(mount.options)


def executed(document: Any) -> None:
    process, _ = spec.process_for_guest(oci.decode(json.dumps(document.get("process")).encode(), "process"))
    oci.encode(process)


READERS: tuple[Callable[[Any], None], ...] = (
    joined,
    for_guest,
    of_sandbox,
    sized,
    updated,
    devices,
    hooks,
    the_rest,
    executed,
)


def test_every_field_is_read_as_declared_or_refused() -> None:
    """In one test, so that one document is made for all of its readers."""
    understood = dict.fromkeys(READERS, 0)

    @settings(max_examples=200)
    @example({"linux": {"resources": {"cpu": {"quota": HUGE}}}})
    @example({"linux": {"resources": {"devices": [{"allow": True, "access": 7}]}}})
    @example({"linux": {"resources": {"devices": [{"allow": True, "major": [], "minor": {}}]}}})
    @example({"linux": {"devices": [{"type": "b", "path": "/dev/sda", "major": HUGE, "minor": -1}]}})
    @example({"hostname": "\ud800"})
    @example({"annotations": {"io.kubernetes.cri.container-type": "sandbox", ANNOTATIONS[2]: "9" * 400}})
    @given(WHOLE)
    def read(changes: dict[str, Any]) -> None:
        document = over(config(process={"args": ["sh"]}), changes)
        before = copy.deepcopy(document)
        for reader in READERS:
            try:
                reader(document)
            except CasemateError:
                continue
            understood[reader] += 1
        assert repr(document) == repr(before), "nobody changes the host's document"

    read()
    assert all(understood.values()), understood
