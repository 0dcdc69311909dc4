"""`make demo`: from a bare machine to a container in a virtual machine of its own, and what it cost.

Runs what a user would type and prints it; everything it says of the run was measured in it.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from images import oci
from rpc.errors import CasemateError
from scripts import containerd, demo_image, product
from scripts.demo_input import report
from scripts.host import executable, main_guard, require_root, run, say
from scripts.manifest import Kind, Manifest

INPUT = Path(report.__file__).parent
RUNTIME = "io.containerd.casemate.v2"
IMAGE = oci.DEMO
QUOTA_GPU_HOURS = 150


def ctr(*arguments: str | Path) -> list[str]:
    return [str(executable("ctr") or "ctr"), *map(str, arguments)]


def ensure_image(manifest: Manifest) -> None:
    """The demo image in containerd: imported when containerd lacks it, or holds another."""
    archive, digest = demo_image.archive()
    for line in run(ctr("images", "ls", f"name=={IMAGE}"), quiet=True).splitlines():
        if line.split()[:3:2] == [IMAGE, digest]:  # REF TYPE DIGEST
            return
    say(f"importing {IMAGE}")
    manifest.record(Kind.CONTAINERD_IMAGE, IMAGE, str(containerd.ADDRESS))
    run(ctr("images", "import", archive), quiet=True)


def run_container(name: str, facts: Path) -> int:
    """`ctr run` as a user would, its output going straight to the terminal. The program's exit code."""
    lines = [
        ["ctr", "run", "--rm", "--runtime", RUNTIME],
        ["--mount", f"type=bind,src={INPUT},dst=/demo,options=rbind:ro"],
        ["--mount", f"type=bind,src={facts},dst=/facts,options=rbind:rw"],
        ["--env", f"QUOTA_GPU_HOURS={QUOTA_GPU_HOURS}"],
        [IMAGE, name],
        ["python3", "/demo/report.py", "/demo/gpu_hours.csv", "--machine", "/facts/machine.json"],
    ]
    print("\n$", " \\\n    ".join(map(shlex.join, lines)), "\n", flush=True)
    arguments = [word for line in lines for word in line][1:]
    return subprocess.run(ctr(*arguments), stdin=subprocess.DEVNULL, check=False).returncode


def compare(guest: dict[str, str]) -> None:
    """What this machine and the container's machine say of themselves, side by side."""
    host = report.machine()
    print(f"\n{'':<12} {'this host':<28} the container")
    for name, value in host.items():
        print(f"{name:<12} {value:<28} {guest[name]}")


def show_next(name: str, found: containerd.Containerd) -> None:
    print("\nNext:")
    print(f"  ctr run --rm -t --runtime {RUNTIME} {IMAGE} shell bash")
    print(f"  casemate trace {name} --chrome demo.json")
    print("  casemate check")
    if found.stop:
        print(f"containerd {found.version} was started for this demo at {containerd.ADDRESS}; to stop it:")
        print(f"  {found.stop}")


def demo() -> None:
    # What is printed is what runs, whatever this shell has set for ctr.
    os.environ.update(CONTAINERD_ADDRESS=str(containerd.ADDRESS), CONTAINERD_NAMESPACE="default")
    manifest = Manifest.read()
    found = containerd.ensure(manifest)
    ensure_image(manifest)
    name = f"demo-{os.getpid()}"
    say(f"containerd {found.version}, host kernel {platform.release()}: one container, one machine")
    with tempfile.TemporaryDirectory(prefix="casemate-demo-") as scratch:
        code = run_container(name, Path(scratch))
        written = Path(scratch) / "machine.json"
        if not written.exists():
            brief = f"the container ended with exit code {code} before its report"
            raise CasemateError(brief, hint=f"casemate logs {name}; casemate check")
        guest = json.loads(written.read_text())
    expected = sum(hours > QUOTA_GPU_HOURS for hours in report.totals(INPUT / "gpu_hours.csv").values())
    if code != expected:
        brief = f"ctr's exit code is {code}, and the program's was {expected}"
        raise CasemateError(brief, hint=f"casemate logs {name}; casemate check")
    print(f"\nexit code {code}: the program's own, one for each team over quota")
    compare(guest)
    print("\nWhere the time went:", flush=True)
    run([product.EXECUTABLES / "casemate", "trace", name])
    show_next(name, found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--prefix", default=str(product.DEFAULT_PREFIX))
    arguments = parser.parse_args()
    try:
        require_root("demo")
        product.install(product.checked_prefix(arguments.prefix))
        product.ensure_image()
        product.ensure_template()
        demo()
    except CasemateError as error:
        return main_guard(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
