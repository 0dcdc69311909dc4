"""What a device plugin's device is on this host, by the id that the plugin has for it: VFIO's, or nothing.

An id is the plugin's own word. Read are those that cannot mean anything else, and those of plugins whose
source says what they mean (docs/gpus.md has the table). It must not know who was told the id, nor what for.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from vfio import hostuse, sysfs
from vfio.address import PciAddress
from vfio.cdinames import Names
from vfio.kinds import NVIDIA

# A number is an IOMMU group for plugins of this maker, that for KubeVirt and that for sandboxes, where no CDI
# file says otherwise. Of another's, it may be the number of anything.
_NUMBERS_ARE_GROUPS = {"nvidia.com": NVIDIA}
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_CDEV = re.compile(r"vfio[0-9]{1,9}")
_DIRECTORY = "/dev/vfio/"
_CDEVS = "/dev/vfio/devices/"
_MADE_UP = "noiommu-"
_ALL_OF_VFIO = frozenset((f"{_DIRECTORY}vfio", "/dev/iommu"))
_GONE = "it was taken from vfio-pci; `casemate gpu list` shows what there is"


@dataclass(frozen=True, slots=True)
class Part:
    """An IOMMU group, or (group None) the function at this address."""

    group: int | None
    address: str = ""

    def __str__(self) -> str:
        return self.address if self.group is None else f"IOMMU group {self.group}"


@dataclass(frozen=True, slots=True)
class Reading:
    """parts: () for what is no device of VFIO's, and then why says what it is instead."""

    parts: tuple[Part, ...]
    why: str = ""


class Reader:
    """names: of CDI, which go before what an id looks like."""

    def __init__(self, names: Names, sys: str = "/sys") -> None:
        self._names = names
        self._sys = sys

    @property
    def left_out(self) -> Mapping[str, str]:
        """Files of CDI that could not be read, and why."""
        return self._names.left_out

    def device(self, resource: str, identifier: str) -> Reading:
        """resource: as in a pod's limits, VENDOR/CLASS. Raises FailedPrecondition or NotFound for a device of
        VFIO's that this host has no more."""
        if found := self.named(f"{resource}={identifier}"):
            return found
        if _CDEV.fullmatch(identifier):
            return Reading((self._part(f"{_CDEVS}{identifier}"),))
        maker = _NUMBERS_ARE_GROUPS.get(resource.partition("/")[0])
        if maker is not None and _NUMBER.fullmatch(identifier) and self._has(int(identifier), maker):
            return Reading((self._group(int(identifier)),))
        try:
            address = PciAddress.parse(identifier)
        except InvalidArgument:
            return Reading((), "its id names no CDI device, nor a device of VFIO's")
        driver = sysfs.link(f"{self._sys}/bus/pci/devices/{address}/driver")
        if not hostuse.drives_for_guests(driver):
            return Reading((), f"its driver is {driver}" if driver else "no driver has it")
        return Reading((Part(None, str(address)),))

    def named(self, name: str) -> Reading | None:
        """Of a name of CDI; None if no file has it. Raises as device(), and FailedPrecondition for one that
        is not clear."""
        found = self._names.get(name)
        if found is None:
            return None
        paths = [path for path in found.nodes if path.startswith(_DIRECTORY) and path not in _ALL_OF_VFIO]
        if not paths:
            return Reading((), f"by {found.file} it has no node of VFIO's")
        return Reading(tuple(self._part(path) for path in paths))

    def _part(self, path: str) -> Part:
        """Of a node, which sysfs has as long as vfio-pci has the device."""
        name = path.removeprefix(_DIRECTORY)
        if name.startswith(_MADE_UP):
            raise FailedPrecondition(f"{path}: no IOMMU is before it")
        if path.startswith(_CDEVS):
            target = sysfs.target(f"{self._sys}/class/vfio-dev/{os.path.basename(path)}")
            # .../0000:3b:00.0/vfio-dev/vfio3
            parts = (target or "").split("/")
            if len(parts) > 2 and parts[-2] == "vfio-dev":
                return Part(None, parts[-3])
        elif _NUMBER.fullmatch(name) and os.path.exists(f"{self._sys}/class/vfio/{name}"):
            return Part(int(name))
        raise NotFound(f"{path}: the host has no such device any more", hint=_GONE)

    def _has(self, group: int, maker: int) -> bool:
        """Whether VFIO has the group, and it a device of the maker's."""
        if not os.path.exists(f"{self._sys}/class/vfio/{group}"):
            return False
        members = self._members(group)
        return any(sysfs.text(f"{members}/{name}/vendor") == f"{maker:#06x}" for name in sysfs.names(members))

    def _group(self, number: int) -> Part:
        """Raises FailedPrecondition where vfioN is another device, as NVIDIA's newer plugin may mean that: it
        has a CDI file that says so."""
        cdev = f"{_CDEVS}vfio{number}"
        if os.path.exists(f"{self._sys}/class/vfio-dev/vfio{number}"):
            other = self._part(cdev)
            if other.address not in sysfs.names(self._members(number)):
                raise FailedPrecondition(
                    f"it may be IOMMU group {number}, or {cdev}, which is {other}",
                    hint="no file of CDI has the name: see that its plugin's does",
                )
        return Part(number)

    def _members(self, group: int) -> str:
        return f"{self._sys}/kernel/iommu_groups/{group}/devices"
