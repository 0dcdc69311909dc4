"""Where a pod's files live. The only module that spells the layout of /run/casemate.

    RUN/pods/KEY/        one running pod; KEY is short because unix socket paths end at 107 bytes
        state.json       what `casemate ps` shows; rewritten atomically at every transition
        journal.jsonl    what was about to be created (shim/journal.py)
        trace.json       spans so far
        console.log      the guest's console, bounded
        shim.log         the shim's own log
        libvirt/         root of the embedded driver
        files/shared/    containers' files, for the shim to mount
        files/served/    the same, read-only but for what is mounted: what virtiofsd serves to the guest
    RUN/ended/KEY/       what is kept of an ended pod: state.json, trace.json, console.log, shim.log
    RUN/spares/ID/       one machine of the pool (node/spare.py); becomes RUN/pods/KEY when a pod takes it
        claim.sock       while it is to be had
    RUN/hooks-KEY.sock   from a container's `start` until its Create, if it has hooks (shim/hookserver.py)
    RUN/cache/           what can be found out again: accel.json, settings.json, verified images

RUN is config/places.py's: /run/casemate, unless the environment says otherwise. pathlib is imported when it
is needed first: `start`, which joins two names, does without its 3 ms.
"""

from config import places

# As random.py of the standard library does: hashlib loads OpenSSL, 3 ms of every start.
try:
    from _sha256 import sha256  # type: ignore[import-not-found] # Python 3.11
except ImportError:
    try:
        from _sha2 import sha256  # type: ignore[import-not-found] # since 3.12
    except ImportError:
        from hashlib import sha256

JOURNAL = "journal.jsonl"
LOG = "shim.log"
CLAIM = "claim.sock"
PODS, SPARES = "pods", "spares"

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from pathlib import Path


def run_dir() -> "Path":
    return _path(places.run_dir())


def _path(text: str) -> "Path":
    from pathlib import Path

    return Path(text)


def pod_key(namespace: str, pod_id: str) -> str:
    """16 hexadecimal digits that stand for (containerd namespace, pod id)."""
    return sha256_hex(f"{namespace}/{pod_id}")[:16]


def hooks_socket(namespace: str, container_id: str) -> str:
    """Where a container's hooks are asked for."""
    return f"{places.run_dir()}/hooks-{pod_key(namespace, container_id)}.sock"


def sha256_hex(text: str) -> str:
    digest: str = sha256(text.encode()).hexdigest()
    return digest


class PodPaths:
    """Paths of one pod, running or ended. Creates nothing."""

    __slots__ = ("_home", "_run", "key")

    def __init__(self, namespace: str, pod_id: str, run: "os.PathLike[str] | None" = None) -> None:
        self._set(pod_key(namespace, pod_id), str(run) if run else places.run_dir())

    @classmethod
    def of_spare(cls, spare_id: str) -> "PodPaths":
        """Of a machine of the pool, which has no records to be kept."""
        paths = cls.from_key(spare_id)
        paths._home = SPARES
        return paths

    @classmethod
    def from_key(cls, key: str) -> "PodPaths":
        """Of a pod that is known by its directory's name alone: a key does not lead back to its id."""
        paths = cls.__new__(cls)
        paths._set(key, places.run_dir())
        return paths

    def _set(self, key: str, run: str) -> None:
        self.key = key
        self._run = run
        self._home = PODS

    def in_words(self, name: str = "") -> str:
        """A file of a running pod's directory, or the directory, as text."""
        directory = f"{self._run}/{self._home}/{self.key}"
        return f"{directory}/{name}" if name else directory

    @property
    def directory(self) -> "Path":
        return _path(self.in_words())

    @property
    def has_records(self) -> bool:
        """Whether something of it is kept in `ended`."""
        return self._home == PODS

    @property
    def homes(self) -> "tuple[Path, ...]":
        """Where directories as this one are, its own first."""
        others = (home for home in (PODS, SPARES) if home != self._home)
        return tuple(_path(f"{self._run}/{home}") for home in (self._home, *others))

    @property
    def ended(self) -> "Path":
        return _path(f"{self._run}/ended/{self.key}")

    @property
    def state(self) -> "Path":
        return self.directory / "state.json"

    @property
    def journal(self) -> "Path":
        return self.directory / JOURNAL

    @property
    def trace(self) -> "Path":
        return self.directory / "trace.json"

    @property
    def console(self) -> "Path":
        return self.directory / "console.log"

    @property
    def log(self) -> "Path":
        return self.directory / LOG

    @property
    def libvirt(self) -> "Path":
        return self.directory / "libvirt"

    @property
    def files(self) -> "Path":
        """What containers have of the host's: root's alone, unlike what is in it."""
        return self.directory / "files"

    @property
    def served(self) -> "Path":
        return self.files / "served"

    @property
    def shared(self) -> "Path":
        return self.files / "shared"
