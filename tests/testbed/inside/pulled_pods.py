"""Run in the bed for test_device_pods.py: a pod's disk is taken out of the host while the pod runs.

What should be seen is the test's business.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.testbed.inside import places
from tests.testbed.inside.given import GONE_S, PCI, SEEN, Long, casemate, ctr, driver, record, states
from tests.testbed.inside.one_pod import timed

DISK = "nvme0"
# The guest is asked, thinks it over for five seconds (Linux's pciehp), and lets go; all of it emulated.
PULL_S = 120.0
# In the container: its node stays, of the disk nothing else does.
STILL = "test -b /dev/data && echo node; ls /sys/class/nvme | wc -l; echo goes on"


def look() -> dict[str, Any]:
    address = places.addresses()[DISK]
    pod = Long("pulled", f"{address},path=/dev/data")
    pod.sees()
    about = record("pulled")
    seen: dict[str, Any] = {"address": address, "before": _gone(about)}
    began = time.monotonic()
    try:
        # As a person does who is about to pull it out. The kernel waits until QEMU has let go of it.
        removing = ["sh", "-c", f"echo 1 > {PCI}/devices/{address}/remove"]
        seen["removed"] = subprocess.run(removing, check=False, timeout=PULL_S).returncode
    except subprocess.TimeoutExpired:
        seen["removed"] = None
    seen["seconds"] = round(time.monotonic() - began, 1)
    seen["there"] = (PCI / "devices" / address).exists()
    seen["after"] = _until_told("pulled")
    seen["exec"] = timed(["ctr", "task", "exec", "--exec-id", "look", "pulled", "sh", "-c", STILL])
    directory = Path("/run/casemate/pods", about["key"])
    seen["log"] = (directory / "shim.log").read_text()
    seen["console"] = (directory / "console.log").read_text(errors="replace")
    seen["ps"] = timed(["casemate", "ps"])["out"]
    seen["claims"] = _claim(address)
    seen["later"] = timed(ctr("later", "true", wish=address))
    seen["ended"] = pod.end()
    seen["quarantined"] = _claim(address)
    Path(PCI / "rescan").write_text("1")
    seen["cleared"] = timed(["casemate", "gpu", "clear", address])
    seen["states"], seen["driver"] = states(), driver(DISK)
    return seen


def _gone(about: Any) -> list[bool]:
    return [each["gone"] for each in about["devices"]]


def _until_told(name: str) -> list[bool]:
    """A bounded poll: the shim has libvirt's word that it is gone, and no reader of state.json has."""
    deadline = time.monotonic() + GONE_S
    while not any(found := _gone(record(name))) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def _claim(address: str) -> list[str]:
    """State and reason of it in the ledger; places know nothing of a device that is not there."""
    devices = casemate("gpu", "claims")["devices"]
    return next(([each["state"], each["reason"]] for each in devices if each["address"] == address), [])


def main() -> int:
    SEEN.write_text(json.dumps({"pulled": look()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
