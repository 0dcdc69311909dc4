"""Run in the bed: where its devices are, as {"gpu0": "0000:41:00.0", ...}; of a fake GPU, what it counted.

Must not know what a test makes of it.
"""

import json
import sys
from pathlib import Path

from tests.testbed import gauges
from tests.testbed.devices import GAUGES, PLACES
from tests.testbed.gauges import Fault

EXCHANGE = Path("/exchange")
ROOT = Path("/sys/devices")


def addresses() -> dict[str, str]:
    """Of each device by its name, as it is now; one that is not there is left out."""
    found = {}
    for name, (bus, *steps) in json.loads((EXCHANGE / PLACES).read_text()).items():
        place: Path | None = ROOT / f"pci{bus}"
        for step in steps:
            place = next(place.glob(f"????:??:{step}"), None) if place else None
        if place:
            found[name] = place.name
    return found


def counted(name: str) -> dict[str, int]:
    return dict(gauges.read(EXCHANGE / GAUGES / name))


def fail(name: str, fault: Fault) -> None:
    gauges.fail(EXCHANGE / GAUGES / name, fault)


def main() -> int:
    print(json.dumps(counted(sys.argv[1]) if len(sys.argv) > 1 else addresses()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
