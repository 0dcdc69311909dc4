"""What can be wrong with giving a device to a stranger: every code, how bad it is, what to do about it.

The one place where a code is declared; docs/gpus.md has table() in it. Looks at nothing: isolation.py does.
"""

from dataclasses import dataclass
from enum import Enum

from config import waivers
from vfio.address import PciAddress


class Severity(Enum):
    REFUSED = "refused"  # it is not given to a pod, unless the code is waived
    WARNING = "warning"  # it is given, and this is said


class Code(Enum):
    """The names that `vfio.waive`, --json and the log have."""

    # the host's
    IOMMU_OFF = "iommu-off"
    NOIOMMU = "noiommu"
    INTERRUPT_REMAPPING = "interrupt-remapping"
    UNSAFE_INTERRUPTS = "unsafe-interrupts"
    ACS_OVERRIDE = "acs-override"
    DENYLIST_OFF = "denylist-off"
    # one device's
    NO_GROUP = "no-group"
    NOIOMMU_GROUP = "noiommu-group"
    GROUP_NOT_VIABLE = "group-not-viable"
    GROUP_SHARED = "group-shared"
    ACS_OFF = "acs-off"
    SWITCH_ACS = "switch-acs"
    ACS_MISSING = "acs-missing"
    CONFIG_UNREADABLE = "config-unreadable"
    NO_ANSWER = "no-answer"
    NO_RESET = "no-reset"
    ATS = "ats"
    OPEN_HANDLES = "open-handles"
    HANDLES_UNKNOWN = "handles-unknown"
    BOOT_DISPLAY = "boot-display"
    ROOT_DISK = "root-disk"
    DISK_IN_USE = "disk-in-use"
    DEFAULT_ROUTE = "default-route"
    NETWORK_UP = "network-up"
    HOST_DRIVER = "host-driver"
    VFS_ENABLED = "vfs-enabled"
    FOREIGN_VF = "foreign-vf"


@dataclass(frozen=True, slots=True)
class Rule:
    severity: Severity
    means: str
    fix: str


_REFUSED, _WARNING = Severity.REFUSED, Severity.WARNING

RULES: dict[Code, Rule] = {
    Code.IOMMU_OFF: Rule(
        _REFUSED,
        "The kernel has no IOMMU groups: a device reaches all of the host's memory.",
        "enable VT-d or AMD-Vi in the firmware, and intel_iommu=on where the kernel needs it",
    ),
    Code.NOIOMMU: Rule(
        _REFUSED,
        "VFIO may be used without an IOMMU (enable_unsafe_noiommu_mode).",
        "set enable_unsafe_noiommu_mode=0 for module vfio",
    ),
    Code.INTERRUPT_REMAPPING: Rule(
        _REFUSED,
        "Interrupts are not remapped: a guest can send any interrupt to the host by a DMA write.",
        "enable interrupt remapping (x2APIC) in the firmware; take intremap=off from the kernel's parameters",
    ),
    Code.UNSAFE_INTERRUPTS: Rule(
        _REFUSED,
        "VFIO is told to do without interrupt remapping (allow_unsafe_interrupts).",
        "set allow_unsafe_interrupts=0 for modules vfio_iommu_type1 and iommufd",
    ),
    Code.ACS_OVERRIDE: Rule(
        _REFUSED,
        "The kernel claims isolation between devices that do not have it (pcie_acs_override).",
        "take pcie_acs_override from the kernel's parameters",
    ),
    Code.DENYLIST_OFF: Rule(
        _REFUSED,
        "vfio-pci takes devices that are known to misbehave in guests (disable_denylist).",
        "set disable_denylist=0 for module vfio_pci",
    ),
    Code.NO_GROUP: Rule(
        _REFUSED,
        "The device has no IOMMU group.",
        "of a disk behind Intel's VMD, switch VMD off in the firmware",
    ),
    Code.NOIOMMU_GROUP: Rule(
        _REFUSED,
        "The device's group was made up by VFIO: no IOMMU is before it.",
        "enable the IOMMU, and bind the device again",
    ),
    Code.GROUP_NOT_VIABLE: Rule(
        _REFUSED,
        "Another device of the IOMMU group is in the hands of a host driver, so that VFIO refuses the group.",
        "give it to the same pod, unbind it, or use a slot whose ports have ACS",
    ),
    Code.GROUP_SHARED: Rule(
        _WARNING,
        "Other devices are in the same IOMMU group: whoever has one has all, and nobody else can have them.",
        "give them to the same pod, or use a slot whose ports have ACS",
    ),
    Code.ACS_OFF: Rule(
        _REFUSED,
        "A port above the device has its ACS switched off: devices below it reach each other past the IOMMU.",
        "leave ACS as the kernel set it at boot (no setpci, no disable_acs_redir), and reboot",
    ),
    Code.SWITCH_ACS: Rule(
        _REFUSED,
        "Ports of a switch above have no ACS: others below it are reached past the IOMMU, groups or not.",
        "give all that is below the switch to one pod, or use a slot whose ports have ACS",
    ),
    Code.ACS_MISSING: Rule(
        _WARNING,
        "A port above the device has no ACS, and nothing that it could reach is outside its group.",
        "use a slot whose ports have ACS",
    ),
    Code.CONFIG_UNREADABLE: Rule(
        _REFUSED,
        "The configuration space of the device or of a port above it can be read by root only.",
        "run it as root",
    ),
    Code.NO_ANSWER: Rule(
        _REFUSED,
        "The device does not answer: its configuration space reads as ones.",
        "power cycle the host; see the kernel's log about it",
    ),
    Code.NO_RESET: Rule(
        _REFUSED,
        "The kernel knows no way to reset the device: what one tenant left in it, the next one finds.",
        "waive it only where one tenant alone is given the device",
    ),
    Code.ATS: Rule(
        _WARNING,
        "Address translation services are on: the IOMMU believes addresses that the device has translated.",
        "give it away only where you trust its firmware; pci=noats switches it off for all",
    ),
    Code.OPEN_HANDLES: Rule(
        _REFUSED,
        "A process of the host has the device open.",
        "end that process first",
    ),
    Code.HANDLES_UNKNOWN: Rule(
        _WARNING,
        "Who has the device open can be seen by root only.",
        "run it as root",
    ),
    Code.BOOT_DISPLAY: Rule(
        _REFUSED,
        "The firmware put its screen there, and the host's console may be on it.",
        "choose another primary display in the firmware",
    ),
    Code.ROOT_DISK: Rule(
        _REFUSED,
        "The host's root file system is on it.",
        "give away another disk",
    ),
    Code.DISK_IN_USE: Rule(
        _REFUSED,
        "The host has mounted it, swaps on it, or has built something on it.",
        "unmount it, swapoff, or take it out of the volume group or array",
    ),
    Code.DEFAULT_ROUTE: Rule(
        _REFUSED,
        "The host's default route goes through it.",
        "give away another card, or one of its VFs",
    ),
    Code.NETWORK_UP: Rule(
        _WARNING,
        "An interface of the host's on it is up.",
        "ip link set NAME down, or give away a VF",
    ),
    Code.HOST_DRIVER: Rule(
        _WARNING,
        "A driver of the host has it, and loses it when a pod gets the device.",
        "`casemate gpu bind` gives it to vfio-pci ahead, so that no program of the host begins to use it",
    ),
    Code.VFS_ENABLED: Rule(
        _REFUSED,
        "It is the physical function of VFs that exist: who has it rules what others have.",
        "echo 0 > sriov_numvfs, or give away VFs",
    ),
    Code.FOREIGN_VF: Rule(
        _REFUSED,
        "Its physical function is in the hands of vfio-pci, and so of another guest.",
        "leave the physical function to its driver on the host",
    ),
}


# Those that say that the host itself uses the device: taking it away would hurt whoever does.
OF_HOST_USE = frozenset(
    {
        Code.OPEN_HANDLES,
        Code.BOOT_DISPLAY,
        Code.ROOT_DISK,
        Code.DISK_IN_USE,
        Code.DEFAULT_ROUTE,
        Code.VFS_ENABLED,
    }
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One code, of the host (subject None) or of a device. text: what was seen, naming it."""

    code: Code
    text: str
    subject: PciAddress | None = None

    @property
    def severity(self) -> Severity:
        return RULES[self.code].severity

    @property
    def fix(self) -> str:
        return RULES[self.code].fix

    @property
    def waivable(self) -> bool:
        return self.code.value in waivers.WAIVABLE


def table() -> str:
    """The table of docs/gpus.md."""
    lines = ["| code | | waived by name | means | what to do |", "|---|---|---|---|---|"]
    for code, rule in RULES.items():
        waived = "yes" if code.value in waivers.WAIVABLE else "no"
        waived = "-" if rule.severity is Severity.WARNING else waived
        lines.append(f"| {code.value} | {rule.severity.value} | {waived} | {rule.means} | {rule.fix} |")
    return "\n".join(lines) + "\n"
