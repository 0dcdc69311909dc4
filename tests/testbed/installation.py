"""casemate in the bed: its dependencies, then this checkout by what `make install` does, then the disk.

Installed from the outside, in a root space over the host's file system, because the bed itself has no
network. Must not know how a bed is started.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from images.kernel import KernelKind
from images.rootspace import Rootspace, copy_sources
from rpc.errors import NotFound
from scripts import containerd, demo_image, product, venv
from scripts.host import CHECKOUT, run, say
from tests.testbed import cache, debian

DISK = "disk.ext4"
DISK_BYTES = 24 << 30  # sparse: it takes what is in it
PLACE = "/root/casemate"  # where the bed has this checkout: shown then and at run time, never copied
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
INIT = "/usr/lib/casemate-testbed/init"
# The rest of what PID 1 does comes from the checkout (inside/init), so that a change of it needs no new disk.
FIRST_INIT = f"""\
#!/bin/sh
mount -t proc proc /proc
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro checkout {PLACE}
exec {PLACE}/tests/testbed/inside/init
"""
MAKE_DEPENDENCIES = (
    "from scripts import product, venv; "
    "venv.ensure(product.DEFAULT_PREFIX, product.product_locks(), what='what casemate depends on')"
)
# What `make install` does, but for the template, which only the host that uses it can make.
INSTALL = "from scripts import product; product.install(product.DEFAULT_PREFIX); product.ensure_image()"
IMPORT = (
    "from scripts import containerd, demo; from scripts.manifest import Manifest, stop_daemon; "
    "manifest = Manifest.read(); containerd.ensure(manifest); demo.ensure_image(manifest); "
    "stop_daemon(containerd.PID_FILE)"
)
# KVM on an emulated CPU is no faster than TCG on a real one, and has the time limits of a real host. Where 32
# pods start at once on two such CPUs, each waits for minutes.
SETTINGS = "etc/casemate/config.d/testbed.toml"
SLOW = """\
allowed_annotations = ["dev.casemate.profile", "dev.casemate/devices"]

[timeouts]
boot_s = 600.0
agent_call_s = 300.0

[vfio]
ready_s = 120.0

# With the drivers that the tuned kernel has not. Booted each time: what is tried with them is of one kind.
[profiles.devices]
image = "cloud"
template = "off"
"""
# What an installation leaves behind that belongs to the outside.
LEFT = ("root/.cache", "root/.config", "var/cache/apt", "var/lib/apt/lists")


def disk() -> Path:
    """An ext4 image with a host that has this checkout's product, the demo's image beside it."""
    host = debian.host()
    dependencies = _dependencies(host)
    containers = _containers(host)
    recipe = [
        *(dependencies.name, containers.name, product.source_stamp(product.DEFAULT_PREFIX)),
        *(FIRST_INIT, INIT, INSTALL, SLOW, DISK_BYTES, *LEFT),
    ]

    def build(target: Path) -> None:
        space, changes = _rootspace(target, dependencies, containers, host), _changes(target)
        images = cache.HOME / "images"
        product.ensure_image(images, KernelKind.TUNED)  # which has 9p
        product.ensure_image(images, KernelKind.CLOUD, "cloud")
        shutil.copytree(images, changes / str(product.IMAGES).lstrip("/"), symlinks=True)
        init = changes / INIT.lstrip("/")
        for path, text in {init: FIRST_INIT, changes / SETTINGS: SLOW}.items():
            path.parent.mkdir(parents=True)
            path.write_text(text)
        init.chmod(0o755)
        space.check([venv.SYSTEM_PYTHON, "-BEs", "-c", INSTALL], cwd=PLACE)
        _clear(changes)
        _write_disk(replace(space, lower=space.lower[1:]), target / DISK)

    return cache.entry("disk", recipe, build) / DISK


def _dependencies(host: Path) -> Path:
    """A tree that holds nothing but the product's virtual environment, for the host's Python."""
    locks = [path.read_text() for path in product.product_locks()]

    def build(target: Path) -> None:
        space = _rootspace(target, host)
        space.check([venv.SYSTEM_PYTHON, "-BEs", "-c", MAKE_DEPENDENCIES], cwd=PLACE)
        _clear(_changes(target))
        target.rmdir()
        _changes(target).rename(target)

    return cache.entry("dependencies", [host.name, *locks, MAKE_DEPENDENCIES, *LEFT], build)


def _containers(host: Path) -> Path:
    """A tree with the demo's image: its archive, and containerd's files with it imported and unpacked."""
    archive, digest = demo_image.archive()

    def build(target: Path) -> None:
        store = target / str(containerd.ROOT).lstrip("/")
        cached = target / str(archive.parent).lstrip("/")
        for directory in (store, cached):
            directory.mkdir(parents=True)
        for path in (archive, archive.with_suffix(".digest")):
            shutil.copyfile(path, cached / path.name)
        # containerd's snapshots cannot lie in an overlay
        space = _rootspace(target, target, host, lent={str(containerd.ROOT): store})
        space.check([venv.SYSTEM_PYTHON, "-BEs", "-c", IMPORT], cwd=PLACE)

    return cache.entry("containers", [host.name, archive.name, digest, IMPORT, containerd.CONFIG], build)


def _rootspace(target: Path, *lower: Path, lent: Mapping[str, Path] | None = None) -> Rootspace:
    """One over these trees and the way to package sources; what it needs lies beside target."""
    if not Path(BUNDLE).is_file():
        raise NotFound(f"{BUNDLE} is missing", hint="apt-get install ca-certificates")
    work, root, sources = (target.with_name(name) for name in ("work", "root", "sources"))
    bundle = sources / BUNDLE.lstrip("/")
    for directory in (_changes(target), work, root, bundle.parent):
        directory.mkdir(parents=True)
    shutil.copyfile(BUNDLE, bundle)
    copy_sources(sources)
    return Rootspace(root, (sources, *lower), _changes(target), work, {PLACE: CHECKOUT}, lent or {})


def _changes(target: Path) -> Path:
    return target.with_name("changes")


def _clear(changes: Path) -> None:
    for name in LEFT:
        if (changes / name).exists():
            shutil.rmtree(changes / name)
    (changes / PLACE.lstrip("/")).mkdir(parents=True, exist_ok=True)


def _write_disk(whole: Rootspace, path: Path) -> None:
    """The merged trees as a file system. They are mounted in a name space that ends with mke2fs."""
    say("testbed: writing its disk")
    options = "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0"
    write = ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-E", options, "-d", str(whole.root)]
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    script = 'script=$1; shift; eval "$script" && exec "$@"'
    command = ["sh", "-c", script, "merge", " ".join(whole.merge()), *write, str(path)]
    run(["unshare", "--mount", "--propagation", "private", *command], quiet=True)
