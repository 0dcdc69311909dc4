"""What the demo runs in a container: sums GPU hours per team from a CSV file, and says who is over quota.

Its exit code is the number of teams over quota. It knows nothing of casemate: any Python >= 3.9 runs it.
"""

import argparse
import csv
import json
import os
import platform
from collections import defaultdict
from pathlib import Path


def totals(path: Path) -> dict[str, float]:
    hours: dict[str, float] = defaultdict(float)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            hours[row["team"]] += int(row["gpus"]) * float(row["hours"])
    return hours


def machine() -> dict[str, str]:
    """What this program sees of the machine it runs on."""
    with Path("/proc/meminfo").open() as file:
        kilobytes = int(file.readline().split()[1])
    return {
        "kernel": platform.release(),
        "host name": platform.node(),
        "CPUs": str(os.cpu_count()),
        "memory": f"{kilobytes // 1024} MiB",
        "up for": f"{float(Path('/proc/uptime').read_text().split()[0]):.1f} s",
        "Python": platform.python_version(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="GPU hours per team")
    parser.add_argument("file", type=Path)
    parser.add_argument("--machine", type=Path, help="write what this machine looks like here")
    arguments = parser.parse_args()
    quota = float(os.environ["QUOTA_GPU_HOURS"])
    over = 0
    print(f"{'team':<12} {'GPU hours':>10}   quota {quota:.0f}")
    for team, hours in sorted(totals(arguments.file).items(), key=lambda entry: -entry[1]):
        over += hours > quota
        print(f"{team:<12} {hours:>10.1f}   {'OVER' if hours > quota else 'ok'}")
    if arguments.machine:
        arguments.machine.write_text(json.dumps(machine()))
    return over


if __name__ == "__main__":
    raise SystemExit(main())
