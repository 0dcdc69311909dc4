"""Which pod a container belongs to that is to be in another one's network: `--network container:X`.

Clients name that network by the pid that they were told of X, which is its anchor's. Two VMs cannot share a
network, but two containers of one VM do. Imported by few starts; must not know how a pod is made.
"""

import json
import os
import re
from collections.abc import Iterator
from typing import Any

from config import places
from rpc.errors import FailedPrecondition
from shim.anchor_program import NAME
from shim.paths import PODS

PATH = re.compile(r"/proc/([1-9][0-9]{0,9})/ns/net")


def pod_of_network(namespace: str, path: str) -> str | None:
    """The id of the pod of containerd's `namespace` that has this network; None if it is no anchor's.

    Raises FailedPrecondition for an anchor of another namespace's, or of a pod that is ending.
    """
    match = PATH.fullmatch(path)
    if match is None or not _is_anchor(match[1]):
        return None
    pid = int(match[1])
    for pod in _pods():
        if pod.get("namespace") == namespace and any(each["pid"] == pid for each in pod["containers"]):
            return str(pod["id"])
    raise FailedPrecondition(
        f"network namespace {path}: it is of no pod that runs in namespace {namespace}",
        hint="a container can be in the network of a container that runs, of the same namespace",
    )


def _is_anchor(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read().strip() == NAME.rstrip(b"\0")
    except (FileNotFoundError, ProcessLookupError):
        return False


def _pods() -> Iterator[dict[str, Any]]:
    """state.json of each; one that is not there (yet) has no container that a client knows."""
    directory = os.path.join(places.run_dir(), PODS)
    for key in os.listdir(directory):
        try:
            with open(os.path.join(directory, key, "state.json"), "rb") as file:
                yield json.load(file)
        except FileNotFoundError:
            continue
