"""Run in the bed by test_devices.py and test_giving.py, for both in one instance.

Writes what was seen to /share/seen.json.
"""

import json
import sys
from pathlib import Path

from tests.testbed.inside.devices import look
from tests.testbed.inside.giving import give

SEEN = Path("/share/seen.json")


def main() -> int:
    SEEN.write_text(json.dumps({"devices": look(), "giving": give()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
