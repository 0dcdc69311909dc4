"""`make uninstall`: takes away what install and demo created, in reverse; Debian packages stay."""

import json
import shutil
import sys
from pathlib import Path

from rpc.errors import CasemateError, FailedPrecondition
from scripts import product
from scripts.host import main_guard, require_root, say
from scripts.manifest import MANIFEST, Manifest, start_time


def running_pods(run: Path) -> list[str]:
    """Pods whose shim still lives, as NAMESPACE/ID."""
    found = []
    for path in run.glob("pods/*/state.json"):
        state = json.loads(path.read_text())
        if start_time(state["pid"]) == state["start_time"]:
            found.append(f"{state['namespace']}/{state['id']}")
    return found


def uninstall() -> None:
    manifest = Manifest.read()
    if not manifest.items:
        say("nothing is installed")
        return
    if pods := running_pods(product.RUN):
        raise FailedPrecondition(
            f"pods are running: {', '.join(sorted(pods))}",
            hint="stop them with the client that started them, or `ctr -n NAMESPACE task kill -s KILL ID`",
        )
    if failures := manifest.undo():
        first, *others = failures
        also = "".join(f"\nalso: {error}" for error in others)
        raise CasemateError(first.brief, details=(first.details or "") + also, hint="make uninstall, again")
    shutil.rmtree(MANIFEST.parent)
    say("uninstalled; the Debian packages stay")


def main() -> int:
    try:
        require_root("uninstall")
        uninstall()
    except CasemateError as error:
        return main_guard(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
