"""Builds a guest image: a kernel and a root file system from Debian packages and our own agent.

Only composes the steps; each is a module of its own. Must not know who uses the image.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from images import crun, initprogram, rootfs
from images.amd import driver as amd
from images.bytecode import find_python
from images.handover import Root, from_root
from images.image import INITRD, KERNEL, ROOTFS, GuestImage
from images.initramfs import initramfs
from images.kernel import CMDLINE, KernelKind, find_kernel, vmlinux
from images.modules import BOOT, ModuleTree, driver_list, feature_list
from images.nvidia import driver as nvidia
from images.packages import Fetched, Request, fetch
from images.store import ImageStore
from images.tuned import kernel as tuned
from images.variant import Driver, Variant
from rpc.errors import CasemateError, DataLoss, FailedPrecondition, InvalidArgument, NotFound

log = logging.getLogger(__name__)

PACKAGES = ("python3-minimal", "libpython3-stdlib", "crun", "busybox-static")
# tiny-initramfs stands in for initramfs-tools, which the kernel's package depends on, and which
# would drag systemd and udev into the download; neither gets into an image
KERNEL_PACKAGES: Mapping[KernelKind, tuple[str, ...]] = {
    KernelKind.CLOUD: ("linux-image-cloud-amd64", "tiny-initramfs"),
    KernelKind.GENERIC: ("linux-image-amd64", "tiny-initramfs"),
    KernelKind.TUNED: (),
}
# Initialisations of the kernel that a guest does without: a random number generator for FIPS that times
# its own jitter for 0.1 s (the kernel's random numbers do not come from it), and self-checks of the keys
# for module signatures (images/modules.py takes those off).
_SKIPPED = ("jent_mod_init", "load_system_certificate_list")
PACKAGED_CMDLINE = (
    "cryptomgr.notests",  # of every cipher
    "lsm=landlock,yama",  # nobody loads a policy for the others
    f"initcall_blacklist={','.join(_SKIPPED)}",
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """Of a variant. ensure: has its driver for a kernel's release. add: puts that into a root."""

    kernel: KernelKind
    ensure: Callable[[str, str, str, Path | None, Progress], Driver]
    add: Callable[[Driver, Path], None]


VARIANTS: Mapping[Variant, _Recipe] = {
    Variant.NVIDIA: _Recipe(KernelKind.CLOUD, nvidia.ensure, nvidia.add),  # whose headers Debian has
    Variant.AMD: _Recipe(KernelKind.GENERIC, amd.ensure, amd.add),  # the cloud's has no DRM
}


@dataclass(frozen=True, slots=True)
class Options:
    """name: under which the store will have it; a variant's is made of it. source: where agent/ and rpc/ are.

    kernel: None is the kind that the image of this name has, or else the cloud's. A variant's is its own
    (VARIANTS), and the generic one is such a variant's only.
    """

    name: str = "default"
    kernel: KernelKind | None = None
    variant: Variant | None = None
    suite: str = "trixie"
    mirror: str = ""
    source: Path = field(default_factory=lambda: Path(__file__).resolve().parent.parent)

    @property
    def stored_as(self) -> str:
        return self.variant.of(self.name) if self.variant else self.name


@dataclass(frozen=True, slots=True)
class Built:
    image: GuestImage
    phases_s: dict[str, float]


class _Phases:
    """Times the steps of a build and tells of each when it begins."""

    def __init__(self, progress: Progress = log.info) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._progress(f"guest image: {name}")
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 3)


def build(
    store: ImageStore, options: Options, cache: Path | None = None, progress: Progress = log.info
) -> Built:
    """Builds an image and adds it to the store under options.name. progress is told of each step."""
    rootfs.check_source(options.source)
    kind = _kernel_kind(store, options)
    options = replace(options, kernel=kind)
    phases = _Phases(progress)
    with phases.phase("packages"):
        packages = (*PACKAGES, *KERNEL_PACKAGES[kind])
        tree = fetch(Request(packages, suite=options.suite, mirror=options.mirror), cache)
    with phases.phase("kernel"):
        built = kind is KernelKind.TUNED
        kernel = tuned.ensure(options.suite, options.mirror, cache, progress) if built else tree
    with phases.phase("crun"):
        static = own_crun(tree, options, cache, progress)
    driver = None
    if options.variant is not None:
        with phases.phase("driver"):
            release = find_kernel(kernel.path).release
            recipe = VARIANTS[options.variant]
            driver = recipe.ensure(release, options.suite, options.mirror, cache, progress)
    with tempfile.TemporaryDirectory(prefix="casemate-image-") as scratch:
        files, about = assemble(tree, kernel, options, Path(scratch), phases, static, driver)
        with phases.phase("store"):
            image = store.add(options.stored_as, files, about)
    return Built(image, phases.seconds)


def own_crun(tree: Fetched, options: Options, cache: Path | None, progress: Progress) -> Path | None:
    """A tree with the crun that crun.py builds; None where that cannot be done, as Debian's does the same."""
    try:
        return crun.ensure(tree, options.suite, options.mirror, cache, progress)
    except CasemateError as error:
        log.warning("the guest gets Debian's crun, not one built for it: %s", error)
        return None


def assemble(
    tree: Fetched,
    kernel_tree: Fetched,
    options: Options,
    scratch: Path,
    phases: _Phases | None = None,
    static: Path | None = None,
    driver: Driver | None = None,
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Makes the image's files in scratch. Returns them and what the manifest says of them.

    static: a tree with a crun instead of that of the packages. driver: what a variant adds.
    """
    phase = (phases or _Phases()).phase
    files = {KERNEL: scratch / KERNEL, ROOTFS: scratch / ROOTFS}
    kind = options.kernel or KernelKind.CLOUD
    kernel = find_kernel(kernel_tree.path)
    modules = ModuleTree(kernel.modules, driver.modules if driver else ())
    start = Root("/dev/vda", "erofs", rootfs.PROGRAM, rootfs.WANTED)
    with phase("vmlinux"):
        files[KERNEL].write_bytes(vmlinux(kernel.image.read_bytes()))
        boot = {f"{module.name}.ko": module.content for module in modules.load_order(BOOT)}
    python = find_python(tree.path)
    root = scratch / "root"
    with phase("root"):
        root.mkdir()
        rootfs.populate(tree.path, python, root, static)
        features, module_files = feature_list(modules, rootfs.MODULES)
        rootfs.add_modules(root, features, module_files, driver_list(modules))
        if options.variant is not None and driver is not None:
            VARIANTS[options.variant].add(driver, root)
    if kind is KernelKind.TUNED:
        rootfs.add_init(root, initprogram.build(from_root(start)))
        cmdline = [*CMDLINE, *tuned.CMDLINE, f"init={rootfs.INIT}"]
    else:
        files[INITRD] = scratch / INITRD
        files[INITRD].write_bytes(initramfs(boot, start))
        cmdline = [*CMDLINE, *PACKAGED_CMDLINE]
    with phase("agent"):
        rootfs.add_agent(root, python, options.source)
    with phase("erofs"):
        rootfs.make_erofs(root, files[ROOTFS])
    about = {
        "cmdline": " ".join(cmdline),
        "architecture": "amd64",
        "suite": options.suite,
        "kernel": kernel.release,
        "kernel_kind": kind.value,
        "features": [line.partition(":")[0] for line in features.splitlines()],
        "python": python.version,
        "crun": "static" if static else "debian",
        "agent": _code_digest(options.source),
        "builder": _builder_digest(),
        "packages": dict(tree.versions),
    }
    if kernel_tree is not tree:
        about["kernel_packages"] = dict(kernel_tree.versions)
    if options.variant is not None and driver is not None:
        about["variant"] = options.variant.value
        about["driver"] = driver.version
        about["driver_packages"] = dict(driver.versions)
    return files, about


def _code_digest(source: Path) -> str:
    """Of the agent's and rpc's sources: tells from which an image was built."""
    return _sources_digest(source, [p for name in ("agent", "rpc") for p in (source / name).rglob("*.py")])


def _builder_digest() -> str:
    """Of the modules of this package, and of the tuned kernel's configuration: the recipe."""
    here = Path(__file__).parent
    return _sources_digest(here, [*here.rglob("*.py"), tuned.FRAGMENT])


def _sources_digest(root: Path, paths: Iterable[Path]) -> str:
    total = sha256()
    for path in sorted(paths):
        content = path.read_bytes()
        total.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return total.hexdigest()


def current(store: ImageStore, options: Options) -> GuestImage | None:
    """The image of that name if it is whole and made from the same agent for the same suite and kernel."""
    try:
        image = store.resolve(options.stored_as)
        store.verify(image)
    except (NotFound, DataLoss, FailedPrecondition) as reason:
        log.info("image %s must be built: %s", options.stored_as, reason)
        return None
    wanted = {
        "agent": _code_digest(options.source),
        "suite": options.suite,
        "kernel_kind": _kernel_kind(store, options).value,
        "builder": _builder_digest(),
    }
    if options.variant is not None:
        wanted["variant"] = options.variant.value
    return image if wanted.items() <= image.manifest.items() else None


def _kernel_kind(store: ImageStore, options: Options) -> KernelKind:
    """A rebuild without a word about the kernel keeps the one that was chosen. Raises InvalidArgument for a
    variant with another kernel than its own, and for what is such a variant's only."""
    if options.variant is not None:
        own = VARIANTS[options.variant].kernel
        if options.kernel not in (None, own):
            raise InvalidArgument(f"the variant {options.variant} is built for the {own} kernel alone")
        return own
    if options.kernel is KernelKind.GENERIC:
        raise InvalidArgument(f"the {KernelKind.GENERIC} kernel is that of the variant {Variant.AMD} alone")
    if options.kernel is not None:
        return options.kernel
    try:
        return KernelKind(store.resolve(options.name).manifest["kernel_kind"])
    except (NotFound, DataLoss, FailedPrecondition, KeyError, ValueError):
        return KernelKind.CLOUD  # no image of that name, none that can be read, or one from before the choice
