"""May this device be given to a stranger? Everything that speaks against it, each with a name.

Strict: what cannot be known counts against the device, and a finding that refuses it does so until an
operator waives its code by name (`vfio.waive`), which the log then says at each use. Changes nothing; must
not know who asks, nor who has the device now.
"""

import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from rpc.errors import FailedPrecondition
from vfio import hostuse, sysfs
from vfio.address import PciAddress
from vfio.configspace import PortType
from vfio.findings import Code, Finding, Severity
from vfio.hostuse import Disks, Holders, Network
from vfio.inventory import SYSFS, Device, Inventory

PROC = "/proc"
_MOST_WORDS = 4
log = logging.getLogger("casemate")

_SWITCHING = (PortType.ROOT_PORT, PortType.DOWNSTREAM)
_CONVENTIONAL = (PortType.PCI_BRIDGE, PortType.PCIE_BRIDGE)
# Drivers beside which VFIO takes a group: they do no DMA by themselves (driver_managed_dma, Linux 5.18).
_HARMLESS = frozenset({"pcieport", "pci-stub"})


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found: of the host, which counts for every device, and of each device that was looked at."""

    host: tuple[Finding, ...]
    devices: dict[PciAddress, tuple[Finding, ...]]
    waived: frozenset[str]

    def of(self, address: PciAddress) -> tuple[Finding, ...]:
        """All that speaks against giving it away: the host's findings, then its own."""
        return self.host + self.devices[address]

    def refuses(self, finding: Finding) -> bool:
        """Whether it does. A code that is no matter of judgement is never waived, whatever is said."""
        if finding.severity is not Severity.REFUSED:
            return False
        return not (finding.waivable and finding.code.value in self.waived)

    def refusals(self, address: PciAddress) -> tuple[Finding, ...]:
        return tuple(filter(self.refuses, self.of(address)))

    def require(self, what: str = "given to a pod", codes: Collection[Code] | None = None) -> None:
        """Log what is waived or warned of. Raises FailedPrecondition if one of the devices is refused.

        what: that which it is then not, for the error. codes: those that count for it; None stands for all.
        """
        refusing: list[Finding] = []
        for finding in (*self.host, *(each for found in self.devices.values() for each in found)):
            if codes is not None and finding.code not in codes:
                continue
            if self.refuses(finding):
                refusing.append(finding)
            elif finding.severity is Severity.REFUSED:
                log.warning("%s is waived by vfio.waive: %s", finding.code.value, finding.text)
            else:
                log.info("%s: %s", finding.code.value, finding.text)
        if not refusing:
            return
        first = refusing[0]
        named = first.subject or next(iter(self.devices), None)
        words = ", ".join(dict.fromkeys(each.code.value for each in refusing))
        hint = first.fix
        if first.waivable:
            hint += f'; an operator who answers for it adds "{first.code.value}" to vfio.waive'
        raise FailedPrecondition(
            f"PCI device {named} is not {what}: {words}",
            details="; ".join(each.text for each in refusing),
            hint=hint,
        )


def audit(
    found: Inventory,
    together: Collection[PciAddress] | None = None,
    *,
    waive: Iterable[str] = (),
    sys: str = SYSFS,
    proc: str = PROC,
) -> Audit:
    """Judge the devices of one pod, which may share a group; or else every device of the host, each alone.

    The other functions of a card come with it, and are judged with it. Raises NotFound and InvalidArgument
    for addresses that no pod can have.
    """
    if together is None:
        sets = {each.address: {each.address, *found.siblings(each.address)} for each in found.devices}
    else:
        chosen = {found.device(address).address for address in together}
        chosen |= {sibling for address in chosen for sibling in found.siblings(address)}
        sets = dict.fromkeys(sorted(chosen), chosen)
    devices = [found.functions[address] for address in sets]
    holders = hostuse.holders(devices, sys, proc)
    disks, network = hostuse.disks(sys, proc), hostuse.network(sys, proc)
    judged = {
        device.address: (
            *_group(found, device, sets[device.address]),
            *_path(found, device, sets[device.address]),
            *_device(found, device),
            *_use(device, holders, disks, network),
        )
        for device in devices
    }
    return Audit(tuple(_host(found, sys, proc)), judged, frozenset(waive))


def _host(found: Inventory, sys: str, proc: str) -> Iterator[Finding]:
    if not found.groups:
        yield Finding(Code.IOMMU_OFF, "the kernel has no IOMMU groups")
        return
    if sysfs.switched_on(f"{sys}/module/vfio/parameters/enable_unsafe_noiommu_mode"):
        yield Finding(Code.NOIOMMU, "enable_unsafe_noiommu_mode of module vfio is on")
    if not remaps_interrupts(sys):
        yield Finding(Code.INTERRUPT_REMAPPING, "no interrupt of this host is remapped")
    for module in ("vfio_iommu_type1", "iommufd"):
        if sysfs.switched_on(f"{sys}/module/{module}/parameters/allow_unsafe_interrupts"):
            yield Finding(Code.UNSAFE_INTERRUPTS, f"allow_unsafe_interrupts of module {module} is on")
    for word in (sysfs.text(f"{proc}/cmdline") or "").split():
        if word.startswith("pcie_acs_override="):
            yield Finding(Code.ACS_OVERRIDE, f"the kernel was started with {word}")
    if sysfs.switched_on(f"{sys}/module/vfio_pci/parameters/disable_denylist"):
        yield Finding(Code.DENYLIST_OFF, "disable_denylist of module vfio_pci is on")


def remaps_interrupts(sys: str = SYSFS) -> bool:
    """Whether the kernel remaps interrupts: the names of x86's interrupt controllers then begin with IR-.

    What the IOMMU could do (ecap of /sys/class/iommu) is another matter: intremap=off, or a firmware that
    keeps x2APIC for itself, leave it off. Names: arch/x86/kernel/apic and drivers/iommu/*/irq_remapping.
    """
    interrupts = f"{sys}/kernel/irq"
    return any(
        (sysfs.text(f"{interrupts}/{number}/chip_name") or "").startswith("IR-")
        for number in sysfs.names(interrupts)
    )


def _group(found: Inventory, device: Device, given: Collection[PciAddress]) -> Iterator[Finding]:
    """given: what goes to the same pod."""
    at = device.address
    if device.group is None:
        if found.groups:
            yield Finding(Code.NO_GROUP, f"{at} has no IOMMU group", at)
        return
    if device.group in found.noiommu_groups:
        yield Finding(Code.NOIOMMU_GROUP, f"{at}: group {device.group} has no IOMMU", at)
    others = [found.functions[each] for each in found.members(at) if each not in given]
    hindering = [each for each in others if _hinders(each)]
    if hindering:
        words = ", ".join(f"{each.address} ({each.driver})" for each in hindering)
        yield Finding(Code.GROUP_NOT_VIABLE, f"{at}: group {device.group} has {words}, too", at)
    shared = [each for each in others if each not in hindering and each.skipped is None]
    if shared:
        words = ", ".join(str(each.address) for each in shared)
        yield Finding(Code.GROUP_SHARED, f"{at}: group {device.group} has {words}, too", at)


def _hinders(other: Device) -> bool:
    driver = other.driver
    return driver is not None and driver not in _HARMLESS and not hostuse.drives_for_guests(driver)


def _path(found: Inventory, device: Device, given: Collection[PciAddress]) -> Iterator[Finding]:
    """ACS of the ports above, as their registers have it now: setpci changes them after groups were made.

    The kernel's groups hold a root port without ACS together with what is below it. Of a switch whose ports
    have none, each port and what is below it is a group of its own, although nothing keeps them apart (seen
    with Linux 6.12 and QEMU's xio3130): there, who else is below the switch is looked for here.
    """
    at = device.address
    for depth, address in enumerate(device.path):
        port = found.functions.get(address)
        if port is None or not port.config.answers:
            yield Finding(Code.CONFIG_UNREADABLE, f"{at}: the port {address} above it cannot be read", at)
        elif not port.config.whole:
            yield Finding(
                Code.CONFIG_UNREADABLE, f"{at}: ACS of the port {address} above it cannot be read", at
            )
        elif port.config.port_type in _CONVENTIONAL:
            yield Finding(Code.ACS_MISSING, f"{at}: {address} above it is a bridge of conventional PCI", at)
        elif port.config.port_type in _SWITCHING:
            acs = port.config.acs
            if acs is None:
                peers = _peers(found, device, device.path[:depth], given)
                if port.config.port_type is PortType.DOWNSTREAM and peers:
                    words = f"has no ACS, and {_some(map(str, peers))} below the same switch"
                    yield Finding(Code.SWITCH_ACS, f"{at}: the port {address} above it {words}", at)
                else:
                    yield Finding(Code.ACS_MISSING, f"{at}: the port {address} above it has no ACS", at)
            elif acs.lacking:
                words = ", ".join((each.name or "").lower().replace("_", " ") for each in acs.lacking)
                yield Finding(Code.ACS_OFF, f"{at}: the port {address} above it has {words} off", at)


def _peers(
    found: Inventory, device: Device, path: tuple[PciAddress, ...], given: Collection[PciAddress]
) -> list[PciAddress]:
    """Who is below the last bridge of path, too: neither in the device's group nor given to the same pod."""
    return [
        other.address
        for other in found.functions.values()
        if path
        and path[-1] in other.path
        and not other.config.is_bridge
        and other.group != device.group
        and other.address not in given
    ]


def _device(found: Inventory, device: Device) -> Iterator[Finding]:
    at = device.address
    if not device.config.answers:
        yield Finding(Code.NO_ANSWER, f"{at} does not answer", at)
    elif not device.config.whole:
        yield Finding(Code.CONFIG_UNREADABLE, f"{at}: only its header can be read", at)
    if device.config.ats_enabled:
        yield Finding(Code.ATS, f"{at} has address translation services on", at)
    if not device.reset_methods:
        yield Finding(Code.NO_RESET, f"{at} has no way to be reset", at)
    if device.vfs:
        yield Finding(Code.VFS_ENABLED, f"{at} has {len(device.vfs)} VFs", at)
    if device.physfn is not None:
        physical = found.functions.get(device.physfn)
        if physical is None or hostuse.drives_for_guests(physical.driver):
            yield Finding(
                Code.FOREIGN_VF, f"{at}: its physical function {device.physfn} is not the host's", at
            )


def _use(device: Device, holders: Holders, disks: Disks, network: Network) -> Iterator[Finding]:
    at = device.address
    held = holders.by_device.get(at, ())
    if held:
        words = dict.fromkeys(f"{each.node} by {each.command} ({each.pid})" for each in held)
        yield Finding(Code.OPEN_HANDLES, f"{at} is open: {_some(words)}", at)
    elif not holders.complete:
        yield Finding(Code.HANDLES_UNKNOWN, f"{at}: not all processes could be looked at", at)
    if device.boot_vga:
        yield Finding(Code.BOOT_DISPLAY, f"{at} is the display that the firmware chose", at)
    if at in disks.root:
        yield Finding(Code.ROOT_DISK, f"{at}: {disks.root[at]}", at)
    if at in disks.used:
        yield Finding(Code.DISK_IN_USE, f"{at}: {_some(disks.used[at])}", at)
    if at in network.default:
        yield Finding(Code.DEFAULT_ROUTE, f"{at}: the default route goes through {network.default[at]}", at)
    if at in network.up:
        yield Finding(Code.NETWORK_UP, f"{at}: {', '.join(network.up[at])} is up", at)
    if device.driver is not None and _hinders(device):
        yield Finding(Code.HOST_DRIVER, f"{at} is bound to {device.driver}", at)


def _some(words: Iterable[str]) -> str:
    """As many as a line takes."""
    listed = list(words)
    more = f" and {len(listed) - _MOST_WORDS} more" if len(listed) > _MOST_WORDS else ""
    return ", ".join(listed[:_MOST_WORDS]) + more
