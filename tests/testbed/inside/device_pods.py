"""Run in the bed by test_device_pods.py: pods that are given devices, one after the other and two at once.

Writes what it saw to /share/seen.json; what that should be is the test's business.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shim.vm.passthrough import IOMMUFD
from tests.testbed.gauges import Fault
from tests.testbed.inside import cards, device_boots, dma, kubelet_pods, numa_pods, places, pulled_pods
from tests.testbed.inside.device_boots import Shape
from tests.testbed.inside.given import (
    GONE_S,
    PCI,
    SEEN,
    Long,
    casemate,
    ctr,
    driver,
    qemu,
    record,
    states,
    until_free,
)
from tests.testbed.inside.one_pod import timed

TWO_GPUS = "count=2,kind=gpu,vendor=10de,device=2330,same=node"
WORDS = "what the guest wrote"
DISK = f"""\
set -e
test -b /dev/data
dd if=/dev/zero of=/dev/data bs=1M count=4 oflag=direct 2>&1
echo '{WORDS}' | dd of=/dev/data conv=fsync,notrunc 2>&1
mkfs.ext4 -q -E offset=8388608 /dev/data 65536 2>/dev/null || echo no mkfs
head -c {len(WORDS)} /dev/data
"""
MAPPED_MIB = 128
CDI_KIND = "example.org/device"


def disk_of(name: str) -> str:
    (controller,) = os.listdir(PCI / "devices" / places.addresses()[name] / "nvme")
    return f"/dev/{controller}n1"


def until_there(node: str) -> str:
    """A driver makes its disks after it was bound. A bounded poll: udev may have none of it to tell yet."""
    end = time.monotonic() + GONE_S
    while not os.path.exists(node) and time.monotonic() < end:
        time.sleep(0.05)
    return node


def mounted() -> dict[str, Any]:
    """A pod that asks for a disk which the host has mounted."""
    disk = disk_of("nvme0")
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    subprocess.run(["mount", disk, "/mnt"], check=True)
    done = timed(ctr("mounted", "true", wish=places.addresses()["nvme0"]))
    seen = {
        "done": done,
        "driver": driver("nvme0"),
        "is_mounted": os.path.ismount("/mnt"),
        "states": states(),
    }
    subprocess.run(["umount", "/mnt"], check=True)
    return seen


def one_nvme() -> dict[str, Any]:
    wish = f"{places.addresses()['nvme0']},path=/dev/data"
    before = driver("nvme0")
    done = timed(ctr("disk", "sh", "-c", DISK, wish=wish))
    with open(disk_of("nvme0"), "rb") as disk:
        words = disk.read(len(WORDS)).decode(errors="replace")
    log = [entry["detail"] for entry in casemate("gpu", "log", places.addresses()["nvme0"])]
    return {"done": done, "before": before, "after": driver("nvme0"), "words": words, "log": log}


def gpus() -> dict[str, Any]:
    """Two pods at once, a third that is refused; QEMU of the one is killed, the shim of the other."""
    pods = [Long(name, TWO_GPUS) for name in ("first", "second")]
    seen: dict[str, Any] = {"sees": {pod.name: pod.sees() for pod in pods}}
    seen["states"] = states()
    seen["list"] = {each["address"]: each["pod"] for each in casemate("gpu", "list")["devices"]}
    seen["records"] = {pod.name: record(pod.name) for pod in pods}
    seen["qemu"] = {pod.name: qemu(pod.name) for pod in pods}
    seen["counted"] = {f"gpu{number}": places.counted(f"gpu{number}") for number in range(4)}
    seen["third"] = timed(ctr("third", "true", wish="kind=gpu,device=2330"))
    seen["trace"] = casemate("trace", "first")
    first, second = pods
    os.kill(record("first")["qemu_pid"], signal.SIGKILL)
    seen["qemu_killed"] = first.ended()
    seen["after_qemu"] = states()
    shim = record("second")["pid"]
    os.kill(shim, signal.SIGKILL)
    seen["shim_killed"] = second.ended()[0]
    subprocess.run(["casemate", "gc"], check=False)
    seen["after_shim"] = until_free(("gpu0", "gpu1", "gpu2", "gpu3"))
    seen["drivers"] = {f"gpu{number}": driver(f"gpu{number}") for number in range(4)}
    return seen


def by_node() -> dict[str, Any]:
    """By a name of CDI, of which ctr makes nodes, a device that an operator bound to vfio-pci ahead; beside
    it a card of two functions, whose link is narrower after its next reset. No IOMMUFD; the tuned kernel.
    """
    where = places.addresses()
    address, card = where["edu0"], where["a6000"]
    seen: dict[str, Any] = {"bound": casemate("gpu", "bind", address), "iommufd_nodes": cdi_nodes(address)}
    iommu = Path("/dev/iommu").rename("/dev/iommu.away")
    seen["nodes"] = cdi_nodes(address)
    pod = Long("odd", card, ("--device", f"{CDI_KIND}={address}"))
    seen |= {
        "sees": pod.sees(),
        "record": record("odd"),
        "qemu": qemu("odd"),
        "nodes_then": cdi_nodes(address),
    }
    places.fail("a6000", Fault.NARROW_AFTER_RESET)
    seen["ended"] = pod.end()
    iommu.rename("/dev/iommu")
    seen["states"], seen["drivers"] = states(), {name: driver(name) for name in ("edu0", "a6000")}
    places.fail("a6000", Fault.NONE)
    seen["cleared"] = timed(["casemate", "gpu", "clear", card])
    return seen


def cdi_nodes(address: str) -> list[str]:
    """What a client puts into config.json for it, from the file in /etc/cdi."""
    spec = casemate("cdi", "generate", "--kind", CDI_KIND)["spec"]
    (device,) = [each for each in spec["devices"] if each["name"] == address]
    return [node["path"] for node in device["containerEdits"]["deviceNodes"]]


def ahead() -> dict[str, Any]:
    """A disk goes to vfio-pci and back, a GPU is reset, by an operator; a mounted disk is not touched."""
    where = places.addresses()
    disk = where["nvme0"]
    seen: dict[str, Any] = {
        "gpu": casemate("gpu", "reset", where["gpu0"]),
        "edu": casemate("gpu", "unbind", where["edu0"]),
    }
    seen["bound"], seen["driver"] = casemate("gpu", "bind", disk), driver("nvme0")
    seen["unbound"] = casemate("gpu", "unbind", disk)
    seen["disk"] = until_there(disk_of("nvme0"))
    seen["cdi"] = timed(["casemate", "cdi", "generate", "--kind", CDI_KIND])
    seen["cdi_files"] = os.listdir("/etc/cdi")
    subprocess.run(["mkfs.ext4", "-q", seen["disk"]], check=True)
    subprocess.run(["mount", seen["disk"], "/mnt"], check=True)
    try:
        seen["mounted"] = {what: timed(["casemate", "gpu", what, disk]) for what in ("bind", "reset")}
    finally:
        subprocess.run(["umount", "/mnt"], check=True)
    return seen


def mapped() -> dict[str, Any]:
    """How often the RAM of a machine is mapped, by its number of devices."""
    with device_boots.profile(MAPPED_MIB):
        shapes = (Shape(1, IOMMUFD), Shape(4, IOMMUFD, huge=True))
        return {str(shape.devices): asdict(device_boots.boot(shape)) for shape in shapes}


def restored() -> dict[str, Any]:
    """The first boots and has a template made; the others are restored from it, and given other devices."""
    seen: dict[str, Any] = {}
    with device_boots.profile(MAPPED_MIB):
        ordinary, huge = (Shape(2, IOMMUFD, huge=each, restored=True) for each in (False, True))
        for shape in (ordinary, huge):
            device_boots.have_a_template(shape)
        where = places.addresses()
        for name, shape, gpus in (
            ("ordinary", ordinary, ("gpu0", "gpu1")),
            ("huge", huge, ("gpu0", "gpu1")),
            ("others", ordinary, ("gpu2", "gpu3")),
        ):
            wish = ",".join(where[each] for each in gpus)
            pod = Long(name, wish, device_boots.profile_of(shape))
            seen[name] = {
                "sees": pod.sees(),
                "record": record(name),
                "qemu": qemu(name),
                "spans": [span["name"] for span in casemate("trace", name)["spans"]],
                "ended": pod.end(),
                "left": until_free(gpus),
            }
    return seen


def main() -> int:
    seen = {"places": places.addresses(), "mounted": mounted(), "nvme": one_nvme()}
    seen |= {"gpus": gpus(), "by_node": by_node(), "ahead": ahead(), "mapped": mapped()}
    seen["restored"] = restored()
    seen |= {"numa": numa_pods.look(), "cards": cards.look(), "dma": dma.look()}
    seen["kubelet"] = kubelet_pods.look()
    seen["pulled"] = pulled_pods.look()
    seen["end"] = {"pods": casemate("ps"), "states": states()}
    SEEN.write_text(json.dumps(seen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
