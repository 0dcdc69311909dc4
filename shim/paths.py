"""Where a pod's files live. The only module that spells the layout of /run/casemate.

    RUN/pods/KEY/        one running pod; KEY is short because unix socket paths end at 107 bytes
        state.json       what `casemate ps` shows; rewritten atomically at every transition
        journal.jsonl    what was about to be created (shim/journal.py)
        trace.json       spans so far
        console.log      the guest's console, bounded
        shim.log         the shim's own log
        libvirt/         root of the embedded driver
        shared/          containers' files, for the shim to mount
        served/          the same, read-only but for what is mounted: what virtiofsd serves to the guest
    RUN/ended/KEY/       what is kept of an ended pod: state.json, trace.json, console.log, shim.log
    RUN/cache/           what can be found out again: accel.json, settings.json, verified images

RUN is /run/casemate, or the environment's CASEMATE_RUN_DIR.
"""

import os
from hashlib import sha256
from pathlib import Path

RUN_DIR_VARIABLE = "CASEMATE_RUN_DIR"


def run_dir() -> Path:
    return Path(os.environ.get(RUN_DIR_VARIABLE) or "/run/casemate")


def pod_key(namespace: str, pod_id: str) -> str:
    """16 hexadecimal digits that stand for (containerd namespace, pod id)."""
    return sha256(f"{namespace}/{pod_id}".encode()).hexdigest()[:16]


class PodPaths:
    """Paths of one pod, running or ended. Creates nothing."""

    __slots__ = ("directory", "ended", "key")

    def __init__(self, namespace: str, pod_id: str, run: Path | None = None) -> None:
        root = run or run_dir()
        self.key = pod_key(namespace, pod_id)
        self.directory = root / "pods" / self.key
        self.ended = root / "ended" / self.key

    @property
    def state(self) -> Path:
        return self.directory / "state.json"

    @property
    def journal(self) -> Path:
        return self.directory / "journal.jsonl"

    @property
    def trace(self) -> Path:
        return self.directory / "trace.json"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def log(self) -> Path:
        return self.directory / "shim.log"

    @property
    def libvirt(self) -> Path:
        return self.directory / "libvirt"

    @property
    def served(self) -> Path:
        return self.directory / "served"

    @property
    def shared(self) -> Path:
        return self.directory / "shared"
