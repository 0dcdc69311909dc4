"""Run in the bed for test_devices.py: what casemate finds of the instance's devices.

What that should be is the test's business.
"""

import json
import subprocess
import time
from pathlib import Path

from tests.testbed.inside import places


def casemate(*words: str) -> dict[str, object]:
    """Also when its exit code is not 0."""
    began = time.monotonic()
    done = subprocess.run(["casemate", *words, "--json"], stdout=subprocess.PIPE, check=False)
    seconds = time.monotonic() - began
    return {"code": done.returncode, "said": json.loads(done.stdout), "seconds": seconds}


def look() -> dict[str, object]:
    where = places.addresses()
    return {
        "places": where,
        "list": casemate("gpu", "list", "--all"),
        "audit": casemate("gpu", "audit"),
        "one": casemate("gpu", "audit", where["gpu0"], where["gpu2"]),
        "shared": casemate("gpu", "audit", where["edu1"]),
        "nodes": Path("/sys/devices/system/node/online").read_text().strip(),
        "iommu": Path("/dev/iommu").exists(),
    }
