"""The agent's API: what the shim asks of PID 1 of the guest. Server: agent/. Client: shim/.

exec_id "" is the container's init. Errors are NotFound, AlreadyExists, FailedPrecondition and
InvalidArgument with one clear brief. It must not know how containers are run.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct

from rpc.api.types import Empty
from rpc.codec import (
    Message,
    boolean,
    bytes_,
    enum_,
    int64,
    messages,
    sint32,
    sint64,
    string,
    string_map,
    strings,
    uint32,
    uint64,
)
from rpc.method import Method

SERVICE = "casemate.agent.v1.Agent"
PROTOCOL = 9
"""Version of this API; both sides send theirs in HELLO."""
STDOUT, STDERR = 1, 2
VSOCK_PORT = 1024
FILES_PORT = 1025
"""Where an agent listens, on vsock."""
NAMESPACES = "/run/casemate/namespaces"
"""In spec_json, the path NAMESPACES/ID/KIND of a namespace means: the one that container ID is in."""
POD_USERS = f"{NAMESPACES}//user"
"""The user namespace of MAKE_USERS."""


NAME_PORT = 53
NAME_HEADER = Struct(">QBH")
"""Before each message of a name server's streams: the question's number, an Asked, how many bytes follow."""


class Asked(IntEnum):
    """A datagram's answer may be cut short; a connection's is whole."""

    BY_DATAGRAM = 1
    BY_CONNECTION = 2


class EventKind(IntEnum):
    EXIT = 1
    OOM = 2


class HelloRequest(Message):
    protocol: int = uint32(1)
    pod_id: str = string(2)
    hostname: str = string(3)
    realtime_ns: int = int64(4)
    entropy: bytes = bytes_(5)


class GuestSpan(Message):
    """A phase of the guest's boot; times are the guest's CLOCK_MONOTONIC."""

    name: str = string(1)
    start_ns: int = int64(2)
    end_ns: int = int64(3)


class HelloResponse(Message):
    """monotonic_ns is the guest's CLOCK_MONOTONIC when it answers: it aligns the spans with the host's."""

    protocol: int = uint32(1)
    version: str = string(2)
    kernel_release: str = string(3)
    python: str = string(4)
    monotonic_ns: int = int64(5)
    spans: list[GuestSpan] = messages(6, GuestSpan)
    rss_bytes: int = uint64(7)
    memory_total_bytes: int = uint64(8)
    memory_used_bytes: int = uint64(9)


class MountShareRequest(Message):
    """tag: of the virtio-fs device, or anything for 9p, which goes over the next connection that the host has
    made to FILES_PORT; path: where in the guest. volumes: what a container binds from the share is taken from
    here instead of from where its root is: the same files, cached less.
    """

    tag: str = string(1)
    path: str = string(2)
    fstype: str = string(3)
    options: list[str] = strings(4)
    volumes: bool = boolean(5)


class ContainerRequest(Message):
    container_id: str = string(1)


class MakePodRequest(Message):
    """Of a pod whose sandbox container is container_id: nothing of it runs in the guest, but others may join
    its PID namespace. shm_path: where its containers find their common /dev/shm, "" if nowhere; sysctls: as
    linux.sysctl, of the guest's own namespaces and kernel.
    """

    container_id: str = string(1)
    shm_path: str = string(2)
    shm_bytes: int = uint64(3)
    sysctls: dict[str, str] = string_map(4)


class IdRange(Message):
    """IDs from `inside` on of a user namespace, and what they are outside of it."""

    inside: int = uint32(1)
    outside: int = uint32(2)
    size: int = uint32(3)


class MakeUsersRequest(Message):
    """A user namespace for the pod. Its network, IPC and UTS namespaces belong to it from then on."""

    uids: list[IdRange] = messages(1, IdRange)
    gids: list[IdRange] = messages(2, IdRange)


class ConnectRequest(Message):
    """To a TCP port of the guest's loopback, for the pod whose sandbox container_id is. What is said there is
    read and written as the streams of its exec_id, STDOUT and stdin; DELETE of it hangs up.
    """

    container_id: str = string(1)
    exec_id: str = string(2)
    port: int = uint32(3)


class NameServerRequest(Message):
    """At a loopback address of the guest's, port NAME_PORT. What is asked there is read as STDOUT of exec_id
    address, container_id "", and answered as its stdin.
    """

    address: str = string(1)


class Disk(Message):
    """A block device for a container: of the machine's disks that of this serial, and its node in the
    container. mode: permission bits."""

    serial: str = string(1)
    path: str = string(2)
    mode: int = uint32(3)
    uid: int = uint32(4)
    gid: int = uint32(5)
    read_only: bool = boolean(6)


class Address(Message):
    """Of an interface. Addresses are 4 or 16 bytes. peer: the other end of a point-to-point link, else empty.
    scope: rtnetlink(7)'s. prefix_route: whether the kernel makes the route to its network."""

    local: bytes = bytes_(1)
    prefix: int = uint32(2)
    peer: bytes = bytes_(3)
    broadcast: bytes = bytes_(4)
    scope: int = uint32(5)
    prefix_route: bool = boolean(6)


class PciDevice(Message):
    """A function of a device that the machine was given. name: whatever the shim calls it. It is behind the
    root port at `port` (bus, slot and function in the guest, "00:06.0"), with this number there.
    kind: "nvme" and so on, by which the agent knows what is to become of it; "" is any other. node: of the
    guest's NUMA nodes, the one that it is on; -1 where the host names none. interface, addresses: of a
    network card, its name ("" leaves that to the agent) and what it is to have.
    """

    name: str = string(1)
    port: str = string(2)
    function: int = uint32(3)
    kind: str = string(4)
    node: int = sint32(5)
    interface: str = string(6)
    addresses: list[Address] = messages(7, Address)


class DevicesRequest(Message):
    """limit_ms: how long each may take to be found, and once more until its driver is done."""

    devices: list[PciDevice] = messages(1, PciDevice)
    limit_ms: int = uint32(2)


class FoundDevice(Message):
    """What has become of one. address: the guest's. driver: "" if there is none for it. nodes: below /dev.
    problem: why it is not what it should be, else ""; words: what the guest's kernel has said about it.
    interfaces: of a network card.
    """

    name: str = string(1)
    address: str = string(2)
    driver: str = string(3)
    nodes: list[str] = strings(4)
    problem: str = string(5)
    words: list[str] = strings(6)
    interfaces: list[str] = strings(7)


class DevicesResponse(Message):
    devices: list[FoundDevice] = messages(1, FoundDevice)


class GivenDevice(Message):
    """One of DevicesRequest for a container. path: where its (first) node is to be, "" for the guest's own
    names. mode: permission bits."""

    name: str = string(1)
    path: str = string(2)
    mode: int = uint32(3)
    uid: int = uint32(4)
    gid: int = uint32(5)


class CreateContainerRequest(Message):
    """spec_json: an OCI config.json whose root.path and mounts are the guest's."""

    container_id: str = string(1)
    spec_json: bytes = bytes_(2)
    terminal: bool = boolean(3)
    stdin: bool = boolean(4)
    disks: list[Disk] = messages(5, Disk)
    devices: list[GivenDevice] = messages(6, GivenDevice)


class CreateContainerResponse(Message):
    pid: int = uint32(1)


class ExecRequest(Message):
    """process_json: an OCI Process."""

    container_id: str = string(1)
    exec_id: str = string(2)
    process_json: bytes = bytes_(3)
    terminal: bool = boolean(4)
    stdin: bool = boolean(5)


class ExecResponse(Message):
    pid: int = uint32(1)


class SignalRequest(Message):
    container_id: str = string(1)
    exec_id: str = string(2)
    signal: int = uint32(3)
    all: bool = boolean(4)


class DeleteRequest(Message):
    """kill: whatever its state; it is killed first, and its exit is not told."""

    container_id: str = string(1)
    exec_id: str = string(2)
    kill: bool = boolean(3)


class WriteStdinRequest(Message):
    container_id: str = string(1)
    exec_id: str = string(2)
    data: bytes = bytes_(3)


class CloseStdinRequest(Message):
    container_id: str = string(1)
    exec_id: str = string(2)


class ReadOutputRequest(Message):
    """stream: STDOUT or STDERR; a terminal has only STDOUT."""

    container_id: str = string(1)
    exec_id: str = string(2)
    stream: int = uint32(3)
    max_bytes: int = uint32(4)


class ReadOutputResponse(Message):
    data: bytes = bytes_(1)
    eof: bool = boolean(2)


class ResizeRequest(Message):
    """width and height in character cells."""

    container_id: str = string(1)
    exec_id: str = string(2)
    width: int = uint32(3)
    height: int = uint32(4)


class UpdateRequest(Message):
    """resources_json: an OCI LinuxResources."""

    container_id: str = string(1)
    resources_json: bytes = bytes_(2)


class ClockRequest(Message):
    """adjust_ns: by how much CLOCK_REALTIME of the guest is to be moved; 0 only asks for it."""

    adjust_ns: int = sint64(1)


class ClockResponse(Message):
    """realtime_ns: what it was before."""

    realtime_ns: int = int64(1)


class StatsResponse(Message):
    """metrics: an encoded io.containerd.cgroups.v2.Metrics (rpc/api/cgroups.py)."""

    metrics: bytes = bytes_(1)


class Interface(Message):
    """port: of its device, as PciDevice says it; empty for lo, which has none. mtu: bytes, 0 for lo.
    asks_nobody: it has IFF_NOARP, and sends to no neighbour's MAC but its own (netdevice(7))."""

    name: str = string(1)
    port: str = string(2)
    mtu: int = uint32(3)
    addresses: list[Address] = messages(4, Address)
    asks_nobody: bool = boolean(5)


class Hop(Message):
    """One way of a route. gateway may be of the other family than the route. weight: 1 or more."""

    gateway: bytes = bytes_(1)
    interface: str = string(2)
    onlink: bool = boolean(3)
    weight: int = uint32(4)


class Route(Message):
    """Of the main table. ipv6: its family. destination: empty for the default route. hops: none for a route
    that refuses (kind says how, as RTN_ of rtnetlink(7)). metrics: the attributes inside RTA_METRICS."""

    ipv6: bool = boolean(1)
    destination: bytes = bytes_(2)
    prefix: int = uint32(3)
    kind: int = uint32(4)
    scope: int = uint32(5)
    priority: int = uint32(6)
    source: bytes = bytes_(7)
    hops: list[Hop] = messages(8, Hop)
    metrics: bytes = bytes_(9)


class Neighbour(Message):
    """A permanent entry of the neighbour table."""

    interface: str = string(1)
    address: bytes = bytes_(2)
    mac: bytes = bytes_(3)


class NetworkRequest(Message):
    """All that the pod's network is to be; what a former request had and this one has not goes."""

    interfaces: list[Interface] = messages(1, Interface)
    routes: list[Route] = messages(2, Route)
    neighbours: list[Neighbour] = messages(3, Neighbour)


class EventsRequest(Message):
    pass


class Event(Message):
    """kind: an EventKind. EXIT comes exactly once per process, an exec's before init's."""

    kind: int = enum_(1)
    container_id: str = string(2)
    exec_id: str = string(3)
    exit_status: int = uint32(4)
    exited_at_ns: int = int64(5)


HELLO = Method(SERVICE, "Hello", HelloRequest, HelloResponse)
MOUNT_SHARE = Method(SERVICE, "MountShare", MountShareRequest, Empty)
MAKE_POD = Method(SERVICE, "MakePod", MakePodRequest, Empty)
MAKE_USERS = Method(SERVICE, "MakeUsers", MakeUsersRequest, Empty)
"""Before the pod's network is told and before any container is made. Once more with the same is no error."""
CONNECT = Method(SERVICE, "Connect", ConnectRequest, Empty)
NAME_SERVER = Method(SERVICE, "NameServer", NameServerRequest, Empty)
CREATE_CONTAINER = Method(SERVICE, "CreateContainer", CreateContainerRequest, CreateContainerResponse)
START_CONTAINER = Method(SERVICE, "StartContainer", ContainerRequest, Empty)
EXEC = Method(SERVICE, "Exec", ExecRequest, ExecResponse)
SIGNAL = Method(SERVICE, "Signal", SignalRequest, Empty)
DELETE = Method(SERVICE, "Delete", DeleteRequest, Empty)
WRITE_STDIN = Method(SERVICE, "WriteStdin", WriteStdinRequest, Empty)
CLOSE_STDIN = Method(SERVICE, "CloseStdin", CloseStdinRequest, Empty)
READ_OUTPUT = Method(SERVICE, "ReadOutput", ReadOutputRequest, ReadOutputResponse)
RESIZE = Method(SERVICE, "Resize", ResizeRequest, Empty)
PAUSE = Method(SERVICE, "Pause", ContainerRequest, Empty)
RESUME = Method(SERVICE, "Resume", ContainerRequest, Empty)
UPDATE = Method(SERVICE, "Update", UpdateRequest, Empty)
NETWORK = Method(SERVICE, "Network", NetworkRequest, Empty)
"""Waits for the devices that it names, and answers when everything is as asked."""
DEVICES = Method(SERVICE, "Devices", DevicesRequest, DevicesResponse)
"""Waits for each of the devices, and answers when the last has come up or its time is over."""
STATS = Method(SERVICE, "Stats", ContainerRequest, StatsResponse)
EVENTS = Method(SERVICE, "Events", EventsRequest, Event, server_streams=True)
CLOCK = Method(SERVICE, "Clock", ClockRequest, ClockResponse)
SYNC = Method(SERVICE, "Sync", Empty, Empty)
PREPARE = Method(SERVICE, "Prepare", Empty, Empty)
"""Makes a booted guest ready to be saved. It forgets its boot, closes the connection when it has answered,
says WAITING on its console, and waits for another connection: the first of whoever it is restored for."""
REHEARSE = Method(SERVICE, "Rehearse", Empty, Empty)
"""Runs a container of the guest's own files from create to delete, so that the next one finds all that it
needs in memory. For a guest that has no container yet."""
SHUTDOWN = Method(SERVICE, "Shutdown", Empty, Empty)
WAITING = "casemate agent: waiting for the shim"

METHODS = (
    HELLO,
    MOUNT_SHARE,
    CREATE_CONTAINER,
    START_CONTAINER,
    EXEC,
    SIGNAL,
    DELETE,
    WRITE_STDIN,
    CLOSE_STDIN,
    READ_OUTPUT,
    RESIZE,
    PAUSE,
    RESUME,
    UPDATE,
    NETWORK,
    DEVICES,
    STATS,
    EVENTS,
    CLOCK,
    SYNC,
    PREPARE,
    REHEARSE,
    SHUTDOWN,
)
