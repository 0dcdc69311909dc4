"""The private containerds that a run needs, and each way of starting a container ready to be measured in one.

Starts, imports, warms up and takes everything away again. What is measured is the others' business.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from bench import gone, settings
from bench.ctr import Ctr, CtrFailed
from bench.instance import CHECKOUT, Binaries, Instance, system_binaries
from bench.ways import Surroundings, Way, check_installed, path_of
from config.load import load
from config.places import IMAGE_DIR_VARIABLE
from config.settings import Settings
from images import builder, oci
from images.image import GuestImage
from images.store import ImageStore
from rpc.errors import DeadlineExceeded, FailedPrecondition, NotFound, PermissionDenied
from shim.paths import CLAIM, SPARES, PodPaths

Say = Callable[[str], None]

NAMESPACE = f"bench-{os.getpid()}"
RUN_S = 180.0
"""One container's whole life, on an emulated machine that emulates another."""
GONE_S = 60.0
CASEMATED_S = 30.0
TEMPLATE_S = 300.0
POOL_S = 120.0
"""From the end of a first pod to that of the process that makes its template, at the lowest priority."""
LOGS, LOG_LINES = 2, 25
"""Shown of each way of casemate when a run fails: so many logs of its pods, the newest, and lines of each."""
RESTORED, POOLED = "restore", "pool"
"""What a pod's state.json calls its source when it was not booted (shim/vm/guest.py, Facts)."""


@dataclass(frozen=True, slots=True)
class PodFacts:
    """What casemate wrote down of a pod; all empty for a runtime that is not casemate."""

    source: str = ""
    accel: str = ""
    accel_reason: str = ""
    vcpus: int = 0
    memory_bytes: int = 0
    shim_pid: int = 0
    files: str = ""


class Runner:
    """One way, on its containerd, with the image imported."""

    def __init__(self, way: Way, ctr: Ctr, image: str) -> None:
        self.way = way
        self.ctr = ctr
        self.image = image
        self.facts_seen: set[PodFacts] = set()

    @property
    def instance(self) -> Instance:
        return self.ctr.instance

    def argv(self, name: str, *command: str, options: Sequence[str] = ()) -> tuple[str, ...]:
        """`ctr run` with the way's runtime."""
        return ("run", "--runtime", self.way.runtime, *self.way.options, *options, self.image, name, *command)

    def run(self, *command: str, options: Sequence[str] = ()) -> str:
        """A container's whole life, not measured. Returns its id."""
        name = self.ctr.new_id("b")
        self.ctr(*self.argv(name, *command, options=("--rm", *options)), timeout_s=RUN_S).ok()
        return name

    @contextlib.contextmanager
    def sleeping(self, options: Sequence[str] = ()) -> Iterator[str]:
        """The id of a container that sleeps; gone without a trace after the block. options: of `ctr run`."""
        before = self.look()
        name = self.ctr.new_id("b")
        try:
            detached = self.argv(name, "sleep", "1000000", options=("--detach", *options))
            self.ctr(*detached, timeout_s=RUN_S).ok()
            self.note(name)
            yield name
        finally:
            self.ctr("task", "delete", "--force", name, timeout_s=RUN_S)
            self.ctr("container", "delete", name).ok()
        gone.wait(self.instance, self.ctr.namespace, before, GONE_S)

    def remove(self, name: str) -> None:
        """Whatever is there of a container that failed: its client may have taken it away, or not."""
        self.ctr("task", "delete", "--force", name, timeout_s=RUN_S)
        self.ctr("container", "delete", name, timeout_s=RUN_S)

    def execute(self, name: str, *command: str, timeout_s: float = RUN_S) -> str:
        """Standard output of a command in a running container."""
        exec_id = self.ctr.new_id("e")
        return self.ctr("task", "exec", "--exec-id", exec_id, name, *command, timeout_s=timeout_s).ok().out

    def look(self) -> gone.Present:
        return gone.look(self.instance, self.ctr.namespace)

    def wait_gone(self, before: gone.Present) -> float:
        """The monotonic time at which nothing that came after `before` was left."""
        return gone.wait(self.instance, self.ctr.namespace, before, GONE_S)

    def wait_pool_full(self) -> None:
        """Who fills it is no child of ours and tells nobody: hence a bounded poll."""
        home = self.instance.path("/run/casemate") / SPARES
        deadline = time.monotonic() + POOL_S
        while len(list(home.glob(f"*/{CLAIM}"))) < self.way.surroundings.pool:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"{self.way.name}: the pool was not full after {POOL_S:.0f} s", self.instance.log_tail()
                )
            time.sleep(gone.LOOK_AGAIN_S)

    def paths(self, name: str) -> PodPaths:
        return PodPaths(self.ctr.namespace, name, self.instance.path("/run/casemate"))

    def note(self, name: str) -> PodFacts:
        """What casemate wrote down of a pod, running or ended; kept for the report, too."""
        if not self.way.is_casemate:
            return PodFacts()
        paths = self.paths(name)
        state = paths.state if paths.state.exists() else paths.ended / paths.state.name
        record: dict[str, Any] = json.loads(state.read_text())
        facts = PodFacts(
            source=record["source"],
            accel=record["accel"],
            accel_reason=record["accel_reason"],
            vcpus=record["vcpus"],
            memory_bytes=record["memory_bytes"],
            shim_pid=record["pid"],
            files=record.get("files", ""),  # which another checkout may not know
        )
        self.facts_seen.add(replace(facts, shim_pid=0))
        return facts


class Stand:
    """All ways of one run. A context manager: at its end no process, mount or file of it is left."""

    def __init__(
        self, ways: Sequence[Way], archive: Path, say: Say, *, binaries: Binaries | None = None
    ) -> None:
        """archive: an OCI archive of one image that has true, echo, cat, sleep and python3."""
        if os.geteuid() != 0:
            raise PermissionDenied("a containerd cannot be started without root", hint="run it as root")
        found = binaries or system_binaries()
        if found is None:
            raise NotFound("no containerd on the PATH", hint="apt-get install containerd")
        check_installed(ways, found.directory)
        self.ways = list(ways)
        self.binaries = found
        self.say = say
        self.settings: Settings = load()
        self.runners: dict[str, Runner] = {}
        self.guest_image: GuestImage | None = None
        self._archive = archive
        # One directory for each checkout, with the first of its containerds: a template is made once.
        self._templates: dict[Path, Path] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            started: dict[Surroundings, tuple[Instance, str]] = {}
            for way in self.ways:
                if way.surroundings not in started:
                    started[way.surroundings] = self._start(way.surroundings, undo)
                instance, image = started[way.surroundings]
                self.runners[way.name] = Runner(way, Ctr(instance, NAMESPACE), image)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._say_logs()
        self._undo.close()

    def _say_logs(self) -> None:
        """The end of what containerd, each way's newest shims and the kernel have said: it is about to go."""
        for name, runner in self.runners.items():
            if not runner.way.is_casemate:
                continue
            instance = runner.ctr.instance
            pods = instance.path("/run/casemate").glob("*/*/*.log")
            newest = sorted(pods, key=lambda path: path.stat().st_mtime)[-LOGS:]
            for log in (instance.log, *newest):
                self.say(f"{name}: {log}:\n{instance.log_tail(LOG_LINES, log)}")
        kernel = subprocess.run(["dmesg"], check=False, capture_output=True, text=True, errors="replace")
        self.say("\n".join(["dmesg:", *(kernel.stdout or kernel.stderr).splitlines()[-LOG_LINES:]]))

    def _start(self, surroundings: Surroundings, undo: contextlib.ExitStack) -> tuple[Instance, str]:
        """A containerd with these surroundings, and the reference of the image it now has."""
        ways = [way for way in self.ways if way.surroundings == surroundings]
        directories = [found for way in ways if (found := path_of(way, self.binaries.directory))]
        instance = Instance(
            self.binaries,
            checkout=surroundings.checkout,
            without_mounts=surroundings.without_mounts,
            more_path=directories,
        )
        undo.enter_context(instance)
        if any(way.is_casemate for way in ways):
            instance.configure(self._configuration(surroundings, instance))
        if surroundings.casemated:
            start_casemated(instance)
        ctr = Ctr(instance, NAMESPACE)
        ctr.import_image(self._archive)
        references = ctr("images", "list", "--quiet").ok().out.split()
        if not references:
            raise FailedPrecondition(f"{self._archive} has no image with a name")
        return instance, references[0]

    def _configuration(self, surroundings: Surroundings, instance: Instance) -> str:
        """What an operator would write to have such pods, with templates that no other run has."""
        checkout = surroundings.checkout
        if checkout == CHECKOUT:
            store = ImageStore(Path(self.settings.image_dir))
            found = self._guest_image(store, surroundings.image)
            # By its digest: whoever builds an image meanwhile shall not change what is measured.
            images, image = store.root, found.digest
            if not surroundings.image or self.guest_image is None:
                self.guest_image = found
        else:
            images, image = instance.base / "images", "default"
            self.say(f"building the guest image of {checkout}")
            build_image(checkout, images)
        return settings.written(
            checkout,
            self.settings,
            images=images,
            templates=self._templates.setdefault(checkout, instance.base / "templates"),
            image=image,
            template=surroundings.template,
            files=surroundings.files,
            pool=surroundings.pool,
        )

    def _guest_image(self, store: ImageStore, kind: str) -> GuestImage:
        """The default profile's, or the one that has the name of its kernel's kind."""
        name = kind or self.settings.profiles[self.settings.default_profile].image
        make = f"casemate image build --name {name}" + (f" --kernel {kind}" if kind else "")
        try:
            found = store.resolve(name)
        except NotFound as error:
            error.hint = make
            raise
        if builder.current(store, builder.Options(name=name)) is None:
            self.say(f"the guest image {name} was made by another casemate: `{make}` makes it anew")
        return found

    @contextlib.contextmanager
    def among(self, names: Collection[str]) -> Iterator[None]:
        """Within it, the ways of these names are all that there are."""
        everyone = self.runners
        self.runners = {name: runner for name, runner in everyone.items() if name in names}
        try:
            yield
        finally:
            self.runners = everyone

    def settle(self) -> None:
        """Until every pool is full: no turn pays for the one before."""
        for runner in self.runners.values():
            if runner.way.surroundings.pool:
                runner.wait_pool_full()

    def warm_up(self) -> None:
        """Fill every cache and have casemate's templates made: no turn pays for what is done once."""
        for runner in self.runners.values():
            way = runner.way
            self.say(f"warming up {way.name}")
            before = runner.look()
            try:
                name = runner.run("true")
            except CtrFailed as error:
                brief = f"{way.name} runs no container with containerd {self.binaries.version}"
                raise FailedPrecondition(brief, str(error), "leave this runtime out") from None
            # The first pod of a shape leaves a process that makes its template, and is gone when it is made.
            gone.wait(runner.instance, NAMESPACE, before, TEMPLATE_S)
            surroundings = way.surroundings
            if way.is_casemate and settings.restores(surroundings.checkout, surroundings.template):
                name = runner.run("true")
                if runner.note(name).source not in (RESTORED, POOLED):
                    self.say(f"{way.name}: its second pod was not restored, though its settings let it be")
                runner.wait_gone(before)
            runner.facts_seen.clear()


def start_casemated(instance: Instance) -> None:
    """Returns when it serves."""
    instance.spawn_ready([str(instance.base / "bin/casemated")], CASEMATED_S)


def build_image(checkout: Path, images: Path) -> None:
    """The guest image of another checkout, made by its own code."""
    environment = {**os.environ, IMAGE_DIR_VARIABLE: str(images), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "image", "build"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise FailedPrecondition(f"{checkout} cannot build its guest image", details=done.stderr[-4000:])


def demo_archive(target: Path) -> None:
    """The demo's image, from where `make test` and `make demo` keep it, or else from Debian packages."""
    kept = os.environ.get("CASEMATE_TEST_DEMO")
    if kept:
        target.symlink_to(Path(kept).resolve(strict=True))
    else:
        oci.write_demo(target)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="casemate-bench-", dir="/var/tmp") as name:
        yield Path(name)
