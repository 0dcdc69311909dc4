"""libvirt's embedded driver: its root directory, its connection, a domain on it, saved and loaded.

The only module that imports libvirt. Blocking: the event loop calls it in a thread. It must not know what
a pod is, nor what is in a domain.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from config.programs import LIBVIRT_LEAST
from config.whole import write_whole
from rpc.errors import CasemateError, DeadlineExceeded, FailedPrecondition, Unavailable
from shim.helper import tail
from shim.landlock import Right, kept_in
from shim.paths import sha256_hex
from shim.vm.cpu_models import without_models
from shim.vm.users import QemuUser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    import libvirt as libvirt_module

# Of qemu.conf(5). "file": no virtlogd; no dynamic ownership: what QEMU opens is readable for it already,
# and must not change hands; no cgroups: QEMU stays in the pod's, as the shim; no hugetlbfs, which guests
# do not use: each driver would leave a directory of its own in it.
QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
namespaces = []
cgroup_controllers = []
hugetlbfs_mount = []
remember_owner = 0
dynamic_ownership = 0
user = "{user}"
group = "{group}"
seccomp_sandbox = 1
max_core = 0
memory_backing_dir = "{memory}"
"""
CAPABILITIES = Path("cache/qemu/capabilities")
FILE_SINCE = (9, 1)  # QEMU
LOG_HEAD = ": starting up libvirt version: "
log = logging.getLogger("casemate")


class Host:
    """One embedded driver, for one domain. root is its directory, seeds where capabilities are kept
    between pods: asking a QEMU that libvirt has not met costs 0.3 to 1.2 s (facts: libvirt 9.0, 12.8)."""

    def __init__(
        self,
        root: Path,
        memory: Path,
        user: QemuUser,
        seeds: Path,
        *,
        cpu_models: bool = True,
        reach: "Mapping[str, Right]",
    ) -> None:
        """memory: where files that are a guest's RAM lie, for domains that have such. cpu_models: whether a
        domain may name one; otherwise what libvirt has learnt of them is not kept. reach: the files that QEMU
        may reach, and libvirt while it starts one."""
        self._root = root
        self._memory = memory
        self._seeds = seeds
        self._cpu_models = cpu_models
        self._reach = reach
        self._seeded: set[tuple[str, bytes]] = set()
        self.user = user
        self._libvirt: libvirt_module | None = None
        self.version: tuple[int, int] | None = None  # libvirt's, once load() has returned
        self._connection: libvirt_module.virConnect | None = None
        self._domain: libvirt_module.virDomain | None = None
        self._created = 0
        self._stopped = threading.Event()
        self._migrated = threading.Event()
        self._halted: Callable[[], None] | None = None

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def prepare(self) -> None:
        """Writes the driver's configuration and seeds its cache. Raises OSError."""
        configuration = QEMU_CONF.format(user=self.user.user, group=self.user.group, memory=self._memory)
        etc = self._root / "etc"
        (etc / "qemu").mkdir(mode=0o711, parents=True)
        # Where the embedded driver looks for it: libvirt 9.0 here, newer ones in qemu/ (both seen).
        for path in (etc / "qemu.conf", etc / "qemu" / "qemu.conf"):
            path.write_text(configuration)
        self._root.chmod(0o711)
        if self._seeds.is_dir():
            target = self._root / CAPABILITIES
            target.mkdir(parents=True)
            for seed in self._seeds.glob("*.xml"):
                content = seed.read_bytes()
                (target / seed.name).write_bytes(content)
                self._seeded.add((seed.name, content))

    def load(self) -> None:
        """Imports libvirt. Raises FailedPrecondition if it is missing or too old."""
        try:
            import libvirt
        except ImportError as error:
            raise FailedPrecondition(
                "libvirt's Python binding cannot be imported",
                details=str(error),
                hint="apt install python3-libvirt libvirt-daemon-driver-qemu",
            ) from error
        version = libvirt.getVersion()
        found = (version // 1_000_000, version // 1_000 % 1_000)
        if found < LIBVIRT_LEAST:
            raise FailedPrecondition(
                f"libvirt {found[0]}.{found[1]} is too old",
                details="{}.{} is the oldest that works".format(*LIBVIRT_LEAST),
                hint="Debian 12 has libvirt 9.0",
            )
        self.version = found
        libvirt.registerErrorHandler(_ignore_error, None)
        self._libvirt = libvirt

    def open(self) -> None:
        """Connects, its event loop first (the driver needs one that runs). Raises Unavailable."""
        libvirt = self._libvirt
        assert libvirt is not None
        # libvirt would register QEMU with systemd-machined over the system bus, by a pid of our PID
        # namespace, which machined takes for the host's. Without a bus it does without (seen with 9.0).
        os.environ["DBUS_SYSTEM_BUS_ADDRESS"] = f"unix:path={self._root}/no-bus"
        try:
            libvirt.virEventRegisterDefaultImpl()
            threading.Thread(target=_run_events, args=(libvirt,), name="libvirt-events", daemon=True).start()
            with _without_path():
                self._connection = libvirt.open(f"qemu:///embed?root={self._root}")
        except libvirt.libvirtError as error:
            raise Unavailable(
                "libvirt's embedded driver does not start",
                details=str(error),
                hint="casemate check says what is missing",
            ) from error

    def memory_file(self, name: str, *, in_a_cell: bool = False) -> Path:
        """The RAM of the next domain to be created, if it is to be a file. in_a_cell: it has one NUMA node.

        virDomainDriverGenerateMachineName and qemuGetMemoryBackingDomainPath of libvirt: an embedded driver
        puts eight digits of its root's SHA-256 and the domain's number before the domain's name.
        """
        driver = sha256_hex(str(self._root))[:8]
        directory = self._memory / "libvirt" / "qemu" / f"qemu-embed-{driver}-{self._created + 1}-{name}"
        return directory / ("ram-node0" if in_a_cell else "pc.ram")

    def create(self, xml: str, name: str, *, paused: bool = False) -> int:
        """Starts a domain and returns QEMU's pid. Raises Unavailable with QEMU's own words."""
        libvirt, connection = self._libvirt, self._connection
        assert libvirt is not None
        assert connection is not None
        self._stopped.clear()
        self._domain = None
        self._created += 1
        try:
            if self._created == 1:
                connection.domainEventRegisterAny(
                    None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None
                )
            flags = libvirt.VIR_DOMAIN_START_PAUSED if paused else 0
            self._domain = kept_in(self._reach, partial(connection.createXML, xml, flags))
        except libvirt.libvirtError as error:
            raise self.failure(str(error), name) from error
        except OSError as error:
            raise FailedPrecondition(f"QEMU cannot be kept from the host's files: {error}") from error
        self._keep_seeds()
        try:
            return int((self._root / "run" / "qemu" / f"{name}.pid").read_text())
        except (FileNotFoundError, ValueError) as error:
            raise self.failure("it ended as soon as it ran", name) from error

    def _on_lifecycle(self, _: object, __: object, event: int, *___: object) -> None:
        """In libvirt's event thread."""
        assert self._libvirt is not None
        if event == self._libvirt.VIR_DOMAIN_EVENT_STOPPED:
            self._stopped.set()
            self._migrated.set()  # or not: whoever waits looks
        elif self._halted is not None and event == self._libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
            self._halted()

    def save_state(self, state: int, limit_s: float) -> None:
        """Suspends the domain and writes all but its RAM to the descriptor `state`. Raises Unavailable,
        DeadlineExceeded."""
        with self._asking():
            self._domain_or_fail().suspend()
            self._migrate("migrate", state, limit_s)

    def load_state(self, state: int, limit_s: float) -> None:
        """Reads what save_state() wrote into a paused domain that waits for it. Raises Unavailable,
        DeadlineExceeded."""
        with self._asking():
            self._migrate("migrate-incoming", state, limit_s)

    def attach(self, device: str) -> None:
        """Plugs a device in. Raises Unavailable."""
        with self._asking("the machine does not take a device"):
            self._domain_or_fail().attachDevice(device)

    def detach(self, device: str) -> None:
        """Asks the guest to let go of a device; where it does not, QEMU keeps it. Raises Unavailable."""
        with self._asking("the machine does not give a device back"):
            self._domain_or_fail().detachDevice(device)

    def follow_devices(
        self, addresses: Collection[str], gone: Callable[[str], None], halted: Callable[[], None]
    ) -> None:
        """Tells gone(), in libvirt's thread or this one, perhaps twice, of each of these functions of the
        host's that the domain has no more: also of one that it lost before. Calls halted() when QEMU stops
        the guest's CPUs, which nobody of ours asks it to from now on. Raises Unavailable."""
        libvirt, domain = self._libvirt, self._domain_or_fail()
        assert libvirt is not None
        assert self._connection is not None
        self._halted = halted
        known: dict[str, str] = {}
        early: list[str] = []

        def on_removed(_: object, __: object, alias: str, ___: object) -> None:
            early.append(alias)
            if address := known.get(alias):
                gone(address)

        with self._asking("libvirt does not tell of devices that a machine loses"):
            event = libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED
            self._connection.domainEventRegisterAny(domain, event, on_removed, None)
            known.update(_passed(domain.XMLDesc(0)))
        missing = set(addresses) - set(known.values())
        # What went while libvirt was asked was in its answer, and was told before the answer was known.
        for address in sorted(missing | {known[alias] for alias in list(early) if alias in known}):
            gone(address)

    def suspend(self) -> None:
        """Raises Unavailable."""
        with self._asking():
            self._domain_or_fail().suspend()

    def resume(self) -> None:
        """Raises Unavailable."""
        with self._asking():
            self._domain_or_fail().resume()

    def _domain_or_fail(self) -> "libvirt_module.virDomain":
        assert self._domain is not None
        return self._domain

    @contextmanager
    def _asking(self, brief: str = "QEMU did not start") -> Iterator[None]:
        assert self._libvirt is not None
        try:
            yield
        except self._libvirt.libvirtError as error:
            raise self.failure(str(error), self._domain_or_fail().name(), brief) from error

    def _migrate(self, command: str, state: int, limit_s: float) -> None:
        """All but RAM: that is a file, and shared memory is left out (capability x-ignore-shared).

        By descriptor: QEMU cannot open the file itself, and libvirt's sandbox kills it for `exec:`.
        """
        import libvirt_qemu

        domain, ended = self._domain_or_fail(), self._migrated
        said: list[str] = []
        ended.clear()

        def on_event(
            _: object, __: object, ___: str, ____: int, _____: int, details: str, ______: object
        ) -> None:
            status = json.loads(details)["status"]
            if status in ("completed", "failed"):
                said.append(status)
                ended.set()

        callback = libvirt_qemu.qemuMonitorEventRegister(
            self._connection, domain, "MIGRATION", on_event, None
        )
        try:
            capability = {"capability": "x-ignore-shared", "state": True}
            self._command("migrate-set-capabilities", {"capabilities": [capability]})
            with self._handed_over(state) as address:
                self._command(command, {"uri": address})
                if not ended.wait(limit_s):
                    raise DeadlineExceeded(f"QEMU did not end {command} within {limit_s:.0f} s")
                if said != ["completed"]:
                    raise self.failure(f"{command} failed", domain.name())
        finally:
            libvirt_qemu.qemuMonitorEventDeregister(self._connection, callback)

    @contextmanager
    def _handed_over(self, state: int) -> Iterator[str]:
        """Gives QEMU a file's descriptor. The address by which it migrates to or from that file.

        `fd:` of a file is deprecated since QEMU 9.1, and refused by 11.1 (seen), which wants `file:`. That
        leaves QEMU its descriptor until it is told otherwise. After an error QEMU is ended.
        """
        version = self._command("query-version", {})["qemu"]
        if (version["major"], version["minor"]) < FILE_SINCE:
            self._command("getfd", {"fdname": "state"}, [state])
            yield "fd:state"
            return
        fdset = self._command("add-fd", {}, [state])["fdset-id"]
        yield f"file:/dev/fdset/{fdset}"
        self._command("remove-fd", {"fdset-id": fdset})

    def _command(self, name: str, arguments: "dict[str, Any]", descriptors: Sequence[int] = ()) -> "Any":
        """One of QEMU's monitor that libvirt has no function for. Returns its answer; raises Unavailable."""
        import libvirt_qemu

        request = json.dumps({"execute": name, "arguments": arguments})
        domain = self._domain_or_fail()
        if descriptors:
            text, _ = libvirt_qemu.qemuMonitorCommandWithFiles(domain, request, list(descriptors), 0)
        else:
            text = libvirt_qemu.qemuMonitorCommand(domain, request, 0)
        answer = json.loads(text)
        if "error" in answer:
            raise Unavailable(f"QEMU refuses {name}", details=str(answer["error"].get("desc")))
        return answer["return"]

    def wait_stopped(self, limit_s: float) -> bool:
        """Until libvirt is done with a domain whose QEMU has ended, if one was created: it writes to its root
        until then."""
        return self._domain is None or self._stopped.wait(limit_s)

    def vsock_cid(self, name: str) -> int:
        """The context id that libvirt gave the domain's vsock device."""
        import re

        libvirt = self._libvirt
        assert libvirt is not None
        assert self._connection is not None
        try:
            xml = self._connection.lookupByName(name).XMLDesc(0)
        except libvirt.libvirtError as error:
            raise self.failure(str(error), name) from error
        found = re.search(r"<cid[^>]*address='(\d+)'", xml)
        if found is None:
            raise Unavailable("libvirt gave the domain no vsock context id")
        return int(found.group(1))

    def failure(self, what: str, name: str, brief: str = "QEMU did not start") -> CasemateError:
        """QEMU's own words if it had any."""
        words = self.log_tail(name)
        # libvirt quotes QEMU itself when it was still waiting for the monitor.
        told = any(line in what for line in words.splitlines())
        details = f"{what}\n{words}" if words and not told else what
        return Unavailable(brief, details=details, hint="casemate check")

    def log_tail(self, name: str) -> str:
        """What QEMU wrote to stderr, without the command line that libvirt puts before it."""
        lines = tail(str(self._root / "log" / "qemu" / f"{name}.log"), 8192).splitlines()
        words = [
            line for line in lines if not (line.startswith("-") or line.endswith("\\") or LOG_HEAD in line)
        ]
        return "\n".join(words[-8:])

    def _keep_seeds(self) -> None:
        """What was learnt about this QEMU serves the next pod. Only a cache: a failure costs time."""
        try:
            for path in (self._root / CAPABILITIES).glob("*.xml"):
                content = path.read_bytes()
                if (path.name, content) in self._seeded:
                    continue
                self._seeds.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_whole(self._seeds / path.name, self._worth_keeping(path.name, content))
        except OSError as error:
            log.warning(f"capabilities of QEMU not kept: {error}")

    def _worth_keeping(self, name: str, content: bytes) -> bytes:
        """What was learnt, without CPU models unless they are needed, or this libvirt has refused it so."""
        if self._cpu_models:
            return content
        lean = without_models(content)
        return content if (name, lean) in self._seeded else lean


def _passed(xml: str) -> dict[str, str]:
    """The PCI address of each of the host's functions that a domain has, by libvirt's alias of it."""
    from xml.etree import ElementTree  # no pod without devices comes here

    found = {}
    for device in ElementTree.fromstring(xml).iterfind("devices/hostdev"):  # noqa: S314 - libvirt's
        alias, address = device.find("alias"), device.find("source/address")
        if alias is None or address is None:
            raise Unavailable("libvirt does not say what it calls a device of the host's")
        domain, bus, slot, function = (
            int(address.attrib[name], 16) for name in ("domain", "bus", "slot", "function")
        )
        found[alias.attrib["name"]] = f"{domain:04x}:{bus:02x}:{slot:02x}.{function}"
    return found


@contextmanager
def _without_path() -> Iterator[None]:
    """Newer libvirt (seen with 12.8; 9.0 knows its path) runs dmidecode where the PATH has it, to be able to
    tell guests what machine the host is. Ours are not told.

    What libvirt sees is changed, and not os.environ, from which a logging program may be given its
    environment in the same moment.
    """
    os.putenv("PATH", "/nonexistent")
    try:
        yield
    finally:
        path = os.environ.get("PATH")
        os.unsetenv("PATH") if path is None else os.putenv("PATH", path)


def _ignore_error(_: object, __: object) -> None:
    """libvirt prints every error to stderr unless told otherwise; ours are raised, and logged there."""


def _run_events(libvirt: "libvirt_module") -> None:
    while True:
        libvirt.virEventRunDefaultImpl()
