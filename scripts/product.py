"""Puts the product onto this machine: packages, virtual environment, executables, the user libvirt wants.

Everything is recorded in the manifest before it is made, and made only if it is not there already.
"""

import os
import shutil
import tempfile
from hashlib import sha256
from pathlib import Path

from images import builder
from images.kernel import KernelKind
from images.store import ImageStore
from images.variant import Variant
from rpc.errors import AlreadyExists, InvalidArgument
from scripts import venv
from scripts.host import (
    CACHE,
    CHECKOUT,
    IMAGE_PACKAGES,
    RUNTIME_PACKAGES,
    distribution,
    install_packages,
    run,
    say,
    succeeds,
)
from scripts.manifest import Kind, Manifest, file_digest
from shim.paths import PODS, SPARES

DEFAULT_PREFIX = Path("/opt/casemate")
EXECUTABLES = Path("/usr/local/bin")
CONFIG = Path("/etc/casemate")
RUN = Path("/run/casemate")
LIBVIRT_RUN = Path("/run/libvirt")
IMAGES = Path("/var/lib/casemate/images")
TEMPLATES = Path("/var/lib/casemate/templates")
LOCKS = CHECKOUT / "requirements"
PACKAGES = ("agent", "bench", "cli", "config", "images", "node", "rpc", "shim", "vfio")

# Embedded libvirt refuses to start without it. Same number as Debian's libvirt-daemon-system gives it.
QEMU_USER = "libvirt-qemu"
QEMU_USER_ID = 64055

# -I and -S: neither the environment nor site's search for packages may slow or change a start, and
# -B: a process of root's writes no bytecode (it was compiled at installation).
LAUNCHER = """\
#!{prefix}/bin/python3 -BIS
# Written by `make install`; taken away by `make uninstall`.
import sys

sys.path += [{code!r}, {site!r}, {system!r}]
from {module} import {function}

sys.exit({function}())
"""
LAUNCHERS = {
    "containerd-shim-casemate-v2": ("shim.bootstrap", "main"),
    "casemate": ("cli.main", "app"),
    "casemated": ("node.main", "main"),
}
# Where systemd runs (sd_booted(3)), casemated is a service of it; elsewhere it is the operator's to run.
SYSTEMD = Path("/run/systemd/system")
SERVICE = Path("/etc/systemd/system/casemated.service")


def checked_prefix(text: str) -> Path:
    """A directory of our own: absolute, fit for a script's first line, and ours already, empty or absent."""
    prefix = Path(os.path.normpath(text))
    if not text.startswith("/") or any(letter.isspace() for letter in text) or len(text) > 100:
        raise InvalidArgument(f"PREFIX={text}: an absolute path of <= 100 letters without blanks is needed")
    ours = (prefix / venv.STAMP).exists() or Manifest.read().holds(Kind.TREE, prefix)
    if not ours and prefix.exists() and (not prefix.is_dir() or any(prefix.iterdir())):
        raise AlreadyExists(f"PREFIX={text} exists and is not casemate's", hint="name an empty directory")
    return prefix


def source_stamp(prefix: Path) -> str:
    """Changes with anything that an installation depends on: our code and data, the locks, the Python."""
    digest = sha256(f"{prefix} {LAUNCHER} {LAUNCHERS} {venv.fingerprint(product_locks())}".encode())
    files = [CHECKOUT / "pyproject.toml", *product_locks()]
    for package in PACKAGES:
        files += (
            path for path in (CHECKOUT / package).rglob("*") if path.is_file() and path.suffix != ".pyc"
        )
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(CHECKOUT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def product_locks() -> list[Path]:
    return [LOCKS / "product.txt"]


def install(prefix: Path) -> bool:
    """Bring this checkout's product to the machine. Whether anything of it changed."""
    known = distribution()
    install_packages(known.names(RUNTIME_PACKAGES | IMAGE_PACKAGES))
    manifest = Manifest.read()
    if manifest.prefix and Path(manifest.prefix) != prefix:
        raise AlreadyExists(
            f"casemate is installed in {manifest.prefix} already", hint="make uninstall, then install again"
        )
    create_qemu_user(manifest)
    record_directories(manifest)
    stamp = source_stamp(prefix)
    if manifest.stamp == stamp and launchers_present():
        return False
    manifest.prefix, manifest.stamp = str(prefix), ""
    manifest.record(Kind.TREE, prefix)
    manifest.write()
    venv.ensure(prefix, product_locks(), what="what casemate depends on")
    code = install_code(prefix, stamp)
    write_launchers(prefix, code, manifest)
    install_service(manifest)
    remove_old_code(code)
    manifest.stamp = stamp
    manifest.write()
    return True


def create_qemu_user(manifest: Manifest) -> None:
    if succeeds(["getent", "passwd", QEMU_USER]):
        return
    say(f"creating the system user {QEMU_USER}: libvirt does not start without it")
    manifest.record(Kind.USER, QEMU_USER, "libvirt-daemon-system")
    free = not succeeds(["getent", "passwd", str(QEMU_USER_ID)])
    number = ["--uid", str(QEMU_USER_ID)] if free else []
    login = ["--no-create-home", "--home-dir", "/var/lib/libvirt", "--shell", "/usr/sbin/nologin"]
    run(["useradd", "--system", "--user-group", *number, *login, QEMU_USER], quiet=True)


def record_directories(manifest: Manifest) -> None:
    """What bears our name on this machine: made here, or by the product when it runs."""
    for tree in (CACHE, RUN, IMAGES, TEMPLATES):
        manifest.record(Kind.TREE, tree)
    if not LIBVIRT_RUN.exists():  # the embedded driver makes it, a libvirt daemon may want it later
        manifest.record(Kind.SHARED_TREE, LIBVIRT_RUN)
    for directory in (CONFIG, CONFIG / "config.d"):
        manifest.record(Kind.DIRECTORY, directory)
        directory.mkdir(exist_ok=True)


def install_code(prefix: Path, stamp: str) -> Path:
    """Build this checkout's wheel with the locked builder, and put it beside the one before, which pods that
    run have not all of in memory. The directory."""
    code = prefix / "code" / stamp[:16]
    if code.is_dir():
        return code
    say(f"installing casemate into {code}")
    python = prefix / "bin/python3"
    with tempfile.TemporaryDirectory() as scratch:
        builder = Path(scratch) / "builder"
        venv.pip(python, "install", "--require-hashes", "--target", builder, "-r", LOCKS / "build.txt")
        offline = ["--no-deps", "--no-index"]
        build = ["wheel", *offline, "--no-build-isolation", "--wheel-dir", scratch, str(CHECKOUT)]
        venv.pip(python, *build, env={"PYTHONPATH": str(builder)})
        (built,) = Path(scratch).glob("*.whl")
        unfinished = code.with_name(f"{code.name}.new")
        shutil.rmtree(unfinished, ignore_errors=True)
        venv.pip(python, "install", *offline, "--target", unfinished, built)
        unfinished.rename(code)
    # For `python3 -m bench`; launchers name the directory themselves.
    (venv.site_packages(prefix) / "casemate-code.pth").write_text(f"{code}\n")
    return code


def remove_old_code(current: Path) -> None:
    """But for the last, which a casemated may run that nobody begins anew, and for all while there are pods:
    a pod goes on with the code that it was begun with."""
    if any(path.is_dir() and any(path.iterdir()) for path in (RUN / PODS, RUN / SPARES)):
        return
    others = sorted(
        (path for path in current.parent.iterdir() if path != current),
        key=lambda path: path.stat().st_mtime_ns,
    )
    for path in others[:-1]:
        shutil.rmtree(path)


def launcher(prefix: Path, code: Path, name: str) -> str:
    module, function = LAUNCHERS[name]
    return LAUNCHER.format(
        prefix=prefix,
        code=str(code),
        site=str(venv.site_packages(prefix)),
        system=str(venv.SYSTEM_PACKAGES),
        module=module,
        function=function,
    )


def launchers_present() -> bool:
    manifest = Manifest.read()
    recorded = {item.name: item.detail for item in manifest.items if item.kind is Kind.FILE}
    paths = [EXECUTABLES / name for name in LAUNCHERS]
    return all(path.is_file() and recorded.get(str(path)) == file_digest(path) for path in paths)


def write_launchers(prefix: Path, code: Path, manifest: Manifest) -> None:
    for name in LAUNCHERS:
        path = EXECUTABLES / name
        text = launcher(prefix, code, name)
        if path.exists() and not manifest.holds(Kind.FILE, path):
            raise AlreadyExists(f"{path} exists and was not installed by `make install`", hint="move it away")
        manifest.record(Kind.FILE, path, sha256(text.encode()).hexdigest())
        scratch = path.with_name(f".{name}.new")
        scratch.write_text(text)
        scratch.chmod(0o755)
        scratch.rename(path)


def install_service(manifest: Manifest) -> None:
    """casemated, enabled and begun anew with the code that was just installed. Nothing without systemd."""
    if not SYSTEMD.is_dir():
        return
    text = (CHECKOUT / "config/systemd" / SERVICE.name).read_text()
    if SERVICE.exists() and not manifest.holds(Kind.SERVICE, SERVICE):
        raise AlreadyExists(f"{SERVICE} exists and was not installed by `make install`", hint="move it away")
    say("starting casemated")
    manifest.record(Kind.SERVICE, SERVICE, sha256(text.encode()).hexdigest())
    SERVICE.write_text(text)
    run(["systemctl", "daemon-reload"], quiet=True)
    run(["systemctl", "enable", "--quiet", SERVICE.name], quiet=True)
    # Pods do without: that it does not start is said, and does not end the installation.
    if not succeeds(["systemctl", "restart", SERVICE.name]):
        say(f"casemated does not start: systemctl status {SERVICE.name}")


def ensure_image(home: Path = IMAGES, kernel: KernelKind | None = None, name: str = "default") -> None:
    """The guest image of that name in this store: built once, and again when what goes into it changed; and
    those of its variants that somebody has built.

    kernel: None keeps the kind that it has.
    """
    store = ImageStore(home)
    wanted = [builder.Options(name=name, kernel=kernel)]
    wanted += [builder.Options(name=name, variant=each) for each in Variant if each.of(name) in store.names()]
    for options in wanted:
        if builder.current(store, options) is None:
            say(f"building the guest image {options.stored_as}")
            builder.build(store, options, progress=say)


def ensure_template() -> None:
    """The default profile's template, so that the first pod is restored already. Without it, it is booted."""
    say("making the template that pods are restored from")
    if not succeeds([EXECUTABLES / "casemate", "template", "build"]):
        say("no template could be made: pods are booted. `casemate template build` says why")
