"""The OCI runtime specification, as far as a shim has to understand it.

Typed views of config.json (github.com/opencontainers/runtime-spec, 1.0 to 1.3); what nobody here needs
stays in the document and goes to the guest's runtime unread. It decides nothing: spec.py does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rpc.errors import InvalidArgument

T = TypeVar("T")
D = TypeVar("D")
Document = dict[str, Any]
NO_ID = (1 << 32) - 1
MOST_ID_RANGES = 340  # user_namespaces(7)
MOST_LIMIT = (1 << 64) - 1
MOST_DEVICE_NUMBER = (1 << 32) - 1  # makedev(3) takes no larger ones, and Linux has fewer


@dataclass(frozen=True, slots=True)
class IdMappings:
    """Of a user namespace or a mount: (ID inside or on disk, outside, how many)."""

    uids: tuple[tuple[int, int, int], ...] = ()
    gids: tuple[tuple[int, int, int], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.uids or self.gids)


UNMAPPED = IdMappings()


@dataclass(frozen=True, slots=True)
class Mount:
    destination: str
    type: str
    source: str
    options: tuple[str, ...]
    id_mappings: IdMappings = UNMAPPED

    @property
    def is_bind(self) -> bool:
        """runc's rule: the type says so, or an option does."""
        return self.type == "bind" or "bind" in self.options or "rbind" in self.options


@dataclass(frozen=True, slots=True)
class Namespace:
    type: str
    path: str


@dataclass(frozen=True, slots=True)
class Device:
    """mode: None where it is not said."""

    path: str
    type: str
    major: int
    minor: int
    mode: int | None
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Hook:
    """args[0] is what the program is told it is called. timeout_s: 0 is no limit."""

    path: str
    args: tuple[str, ...]
    env: Mapping[str, str]
    timeout_s: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Of linux.resources. Where one is not given, 0; below 0 means unlimited."""

    memory_bytes: int = 0
    cpu_quota_us: int = 0
    cpu_period_us: int = 0


@dataclass(frozen=True, slots=True)
class Spec:
    """document is the whole of config.json; the rest are views of parts of it."""

    document: Document
    terminal: bool
    args: tuple[str, ...]
    hostname: str
    rootfs: str
    readonly: bool
    mounts: tuple[Mount, ...]
    namespaces: tuple[Namespace, ...]
    devices: tuple[Device, ...]
    hooks: Mapping[str, tuple[Hook, ...]]
    """By kind, in their order; without kinds that have none."""
    limits: Limits
    cgroups_path: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict)
    id_mappings: IdMappings = UNMAPPED

    def namespace(self, kind: str) -> Namespace | None:
        """None means that the container would stay in the host's."""
        return next((entry for entry in self.namespaces if entry.type == kind), None)


def parse(document: object) -> Spec:
    """Raises InvalidArgument naming the field that is missing or of another type."""
    spec = typed(document, dict, "config.json")
    process = _get(spec, "process", dict, {}, "config.json")
    root = _get(spec, "root", dict, {}, "config.json")
    linux = _get(spec, "linux", dict, {}, "config.json")
    return Spec(
        document=spec,
        terminal=_get(process, "terminal", bool, False, "process"),
        args=_texts(process, "args", "process"),
        hostname=_get(spec, "hostname", str, "", "config.json"),
        rootfs=_get(root, "path", str, "", "root"),
        readonly=_get(root, "readonly", bool, False, "root"),
        mounts=tuple(_mount(entry) for entry in _get(spec, "mounts", list, [], "config.json")),
        namespaces=tuple(_namespace(entry) for entry in _get(linux, "namespaces", list, [], "linux")),
        devices=tuple(_device(entry) for entry in _get(linux, "devices", list, [], "linux")),
        hooks=hooks(_get(spec, "hooks", dict, {}, "config.json")),
        limits=limits(_get(linux, "resources", dict, {}, "linux")),
        cgroups_path=_get(linux, "cgroupsPath", str, "", "linux"),
        annotations=_annotations(_get(spec, "annotations", dict, {}, "config.json")),
        id_mappings=_id_mappings(linux, "linux"),
    )


def decode(text: bytes, where: str) -> Document:
    """Raises InvalidArgument for what is not an object of JSON."""
    import json

    try:
        return typed(json.loads(text), dict, where)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"OCI spec: {where} is not JSON", details=str(error)) from error


def encode(document: Document) -> bytes:
    """For the guest. Raises InvalidArgument for what only the host's reader of JSON could take."""
    import json

    try:
        return json.dumps(document, separators=(",", ":")).encode()
    except (RecursionError, ValueError) as error:
        raise InvalidArgument("config.json cannot be handed to the guest", details=str(error)) from error


def hooks(document: Document) -> dict[str, tuple[Hook, ...]]:
    """As Spec.hooks. Raises InvalidArgument naming what is not as config.md has it ("Hooks")."""
    found = {}
    for kind in document:
        entries = _get(document, kind, list, [], "hooks")
        if entries:
            found[kind] = tuple(_hook(entry, f"hooks.{kind}[{at}]") for at, entry in enumerate(entries))
    return found


def limits(resources: Document) -> Limits:
    """Raises InvalidArgument naming the field that is of another type, or no number of the kernel's."""
    memory = _get(resources, "memory", dict, {}, "linux.resources")
    cpu = _get(resources, "cpu", dict, {}, "linux.resources")
    return Limits(
        memory_bytes=_limit(memory, "limit", "linux.resources.memory"),
        cpu_quota_us=_limit(cpu, "quota", "linux.resources.cpu"),
        cpu_period_us=_limit(cpu, "period", "linux.resources.cpu"),
    )


def limited(value: int, where: str) -> int:
    """A number of Limits; InvalidArgument for one that no client's 64 bits hold."""
    if not -MOST_LIMIT <= value <= MOST_LIMIT:
        raise InvalidArgument(f"OCI spec: {where} has more than 64 bits")
    return value


def _limit(document: Document, name: str, where: str) -> int:
    return limited(_get(document, name, int, 0, where), f"{where}.{name}")


def oom_score(spec: Spec) -> int | None:
    """process.oomScoreAdj, or None where it is not said. Raises InvalidArgument for what no kernel takes."""
    process = _get(spec.document, "process", dict, {}, "config.json")
    score = _get(process, "oomScoreAdj", int, None, "process")
    if score is not None and not -1000 <= score <= 1000:  # OOM_SCORE_ADJ_MIN and _MAX of linux/oom.h
        raise InvalidArgument(f"OCI spec: process.oomScoreAdj {score} is not within -1000 and 1000")
    return score


def typed(value: object, kind: type[T], where: str) -> T:
    """value, if it is of that type; else InvalidArgument, naming the field."""
    # bool is an int to Python, not to JSON.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidArgument(f"OCI spec: {where} is not of type {kind.__name__}")
    return value


def _get(document: Document, name: str, kind: type[T], default: D, where: str) -> T | D:
    """Absent and null are the same, as Go writes either for an empty value."""
    value = document.get(name)
    return default if value is None else typed(value, kind, f"{where}.{name}")


def _texts(document: Document, name: str, where: str) -> tuple[str, ...]:
    values = _get(document, name, list, [], where)
    return tuple(typed(value, str, f"{where}.{name}[{index}]") for index, value in enumerate(values))


def _mount(entry: object) -> Mount:
    mount = typed(entry, dict, "mounts[]")
    destination = _get(mount, "destination", str, "", "mounts[]")
    if not destination.startswith("/"):
        raise InvalidArgument(f"OCI spec: mount destination {destination!r} is not absolute")
    return Mount(
        destination=destination,
        type=_get(mount, "type", str, "", "mounts[]"),
        source=_get(mount, "source", str, "", "mounts[]"),
        options=_texts(mount, "options", "mounts[]"),
        id_mappings=_id_mappings(mount, f"mount {destination}"),
    )


def _id_mappings(document: Document, where: str) -> IdMappings:
    return IdMappings(*(_id_ranges(document, name, where) for name in ("uidMappings", "gidMappings")))


def _id_ranges(document: Document, name: str, where: str) -> tuple[tuple[int, int, int], ...]:
    """Numbers that are IDs; whether they overlap is the kernel's to say."""
    found = []
    for entry in _get(document, name, list, [], where):
        line = typed(entry, dict, f"{where}.{name}[]")
        inside, outside, size = (
            _get(line, key, int, 0, f"{where}.{name}[]") for key in ("containerID", "hostID", "size")
        )
        if min(inside, outside) < 0 or size < 1 or max(inside, outside) + size > NO_ID:
            raise InvalidArgument(f"OCI spec: {where}.{name}: {inside} {outside} {size} are no IDs")
        found.append((inside, outside, size))
    if len(found) > MOST_ID_RANGES:
        raise InvalidArgument(f"OCI spec: {where}.{name}: the kernel takes {MOST_ID_RANGES} at most")
    return tuple(found)


def _namespace(entry: object) -> Namespace:
    namespace = typed(entry, dict, "linux.namespaces[]")
    return Namespace(
        type=_get(namespace, "type", str, "", "linux.namespaces[]"),
        path=_get(namespace, "path", str, "", "linux.namespaces[]"),
    )


def _device(entry: object) -> Device:
    device = typed(entry, dict, "linux.devices[]")
    return Device(
        path=_get(device, "path", str, "", "linux.devices[]"),
        type=_get(device, "type", str, "", "linux.devices[]"),
        major=_device_number(device, "major"),
        minor=_device_number(device, "minor"),
        mode=_get(device, "fileMode", int, None, "linux.devices[]"),
        uid=_get(device, "uid", int, 0, "linux.devices[]"),
        gid=_get(device, "gid", int, 0, "linux.devices[]"),
    )


def _device_number(device: Document, name: str) -> int:
    number = _get(device, name, int, 0, "linux.devices[]")
    if not 0 <= number <= MOST_DEVICE_NUMBER:
        raise InvalidArgument(f"OCI spec: linux.devices[].{name} is no device's number")
    return number


def _hook(entry: object, where: str) -> Hook:
    hook = typed(entry, dict, where)
    path = _get(hook, "path", str, "", where)
    if not path.startswith("/"):
        raise InvalidArgument(f"OCI spec: {where}.path {path!r} is not absolute")
    env = {}
    for text in _texts(hook, "env", where):
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise InvalidArgument(f"OCI spec: {where}.env: {text!r} is not NAME=value")
        env[name] = value
    timeout_s = _get(hook, "timeout", int, None, where)
    if timeout_s is not None and timeout_s <= 0:
        raise InvalidArgument(f"OCI spec: {where}.timeout {timeout_s} is not greater than zero")
    args = _texts(hook, "args", where) or (path,)
    if any("\0" in text for text in (path, *args, *env, *env.values())):
        raise InvalidArgument(f"OCI spec: {where} has a NUL in it")
    return Hook(path, args, env, timeout_s or 0)


def _annotations(document: Document) -> dict[str, str]:
    return {name: typed(value, str, f"annotations[{name!r}]") for name, value in document.items()}
