"""Which programs of the host casemate needs, how old they may be, and where they are looked for.

One table for the shim, which starts them, and `casemate check`, which explains what is missing.
Starts nothing.
"""

import os

from config.settings import Settings
from rpc.errors import NotFound

QEMU_LEAST = (7, 2)
LIBVIRT_LEAST = (9, 0)

VIRTIOFSD_PLACES = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd")
QBOOT_PLACES = ("/usr/share/qemu/qboot.rom", "/usr/share/qemu-kvm/qboot.rom")


def virtiofsd(settings: Settings) -> str:
    """The path of the daemon that serves files to guests. Raises NotFound."""
    return _find("virtiofsd", settings.virtiofsd, VIRTIOFSD_PLACES, "apt-get install virtiofsd")


def firmware(settings: Settings) -> str:
    """The path of the guests' firmware. Raises NotFound."""
    return _find("qboot firmware", settings.firmware, QBOOT_PLACES, "apt-get install qemu-system-data")


def qemu(settings: Settings) -> str:
    """The path of QEMU. Raises NotFound."""
    return _find("QEMU", settings.qemu, (), "apt-get install qemu-system-x86")


def _find(what: str, configured: str, usual: tuple[str, ...], remedy: str) -> str:
    candidates = usual if configured == "auto" else (configured,)
    for path in candidates:
        if os.path.isfile(path):
            return path
    raise NotFound(f"{what} is not at {' or '.join(candidates)}", hint=remedy)
