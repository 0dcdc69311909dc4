"""Devices for pods: what VFIO needs on this host, and whether its GPUs may be given away."""

from collections.abc import Iterator

from cli.checks.programs import versions
from cli.checks.result import CheckContext, Result, ok, warning
from rpc.errors import FailedPrecondition
from shim.vm.versions import lacking
from vfio import inventory, isolation
from vfio.findings import Code, Severity
from vfio.inventory import Device
from vfio.isolation import Audit
from vfio.kinds import Kind
from vfio.names import PciNames
from vfio.offer import configured, not_gpus

_GPUS = (Kind.GPU, Kind.NVSWITCH, Kind.ACCELERATOR)


def devices(context: CheckContext) -> Iterator[Result]:
    """Of a host that gives no devices away, nothing is wrong here, whatever it lacks."""
    name = "devices"
    sys, proc = str(context.path("/sys")), str(context.path("/proc"))
    try:
        found = inventory.read(sys, PciNames())
    except FailedPrecondition as error:
        yield ok(name, error.brief)
        return
    audit = isolation.audit(found, waive=context.settings.vfio.waive, sys=sys, proc=proc)
    gpus = [each for each in found.devices if each.kind in _GPUS and not _is_console(audit, each)]
    if not gpus:
        yield ok(name, "no GPU beside the console's")
        return
    if Code.IOMMU_OFF in {finding.code for finding in audit.host}:
        yield ok(name, f"{len(gpus)} GPUs or switches, which no pod gets without an IOMMU")
        return
    if not context.path("/sys/bus/pci/drivers/vfio-pci").is_dir():
        yield warning(
            "vfio-pci",
            "not loaded: no device can be taken from its driver",
            "modprobe vfio-pci, and vfio-pci in /etc/modules-load.d/casemate.conf for the next boot",
        )
    else:
        lacks = lacking("iommufd", versions(context))
        if not lacks and not context.path("/dev/iommu").exists():
            lacks = "no /dev/iommu"
        yield ok("vfio-pci", f"loaded; by groups, not by iommufd: {lacks}" if lacks else "loaded; by iommufd")
    for finding in audit.host:
        if finding.severity is Severity.REFUSED:
            word = "" if audit.refuses(finding) else " (waived)"
            yield warning(finding.code.value, f"{finding.text}{word}", finding.fix)
    refused = [each for each in gpus if audit.refusals(each.address)]
    said = f"{len(gpus) - len(refused)} of {len(gpus)} GPUs and switches may be given to pods"
    if not refused:
        yield ok(name, said)
        return
    codes = dict.fromkeys(finding.code.value for each in refused for finding in audit.refusals(each.address))
    yield warning(name, f"{said}; the others not: {', '.join(codes)}", "casemate gpu audit, docs/gpus.md")


def partitions(context: CheckContext) -> Iterator[Result]:
    """Whether the NVLink partitions that the operator lists are of GPUs that this host has. None, no line."""
    listed = configured(context.settings.vfio.partitions)
    if not listed:
        return
    name = "NVLink partitions"
    try:
        found = inventory.read(str(context.path("/sys")), PciNames())
    except FailedPrecondition as error:
        yield warning(
            name, f"{len(listed)} are listed, and {error.brief}", "take them out of vfio.partitions"
        )
        return
    wrong = not_gpus(listed, found)
    for partition, members in wrong.items():
        said = ", ".join(f"{address} is {what}" for address, what in members.items())
        yield warning(
            name,
            f"{partition} of vfio.partitions is given to no pod: {said}",
            "list the GPUs that `casemate gpu list` has",
        )
    if not wrong:
        yield ok(name, ", ".join(f"{each.name} of {len(each.members)} GPUs" for each in listed))


def _is_console(audit: Audit, device: Device) -> bool:
    """A screen that the host keeps, as that of a server's management controller: nothing to be mended."""
    return Code.BOOT_DISPLAY in {each.code for each in audit.refusals(device.address)}
