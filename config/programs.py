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
SEABIOS_PLACES = ("/usr/share/seabios/bios-256k.bin", "/usr/share/qemu/bios-256k.bin")


def virtiofsd(settings: Settings) -> str:
    """The path of the daemon that serves files to guests. Raises NotFound."""
    return _find("virtiofsd", settings.virtiofsd, VIRTIOFSD_PLACES, "apt-get install virtiofsd")


def firmware(settings: Settings, *, several_roots: bool = False) -> str:
    """The path of the guests' firmware. Raises NotFound.

    several_roots: a guest has more than one PCI root bus. qboot leaves all of PCI to the guest's kernel, and
    that knows no windows of another root bus but what a firmware has set up (QEMU, hw/i386/acpi-build.c).
    """
    if several_roots and settings.firmware == "auto":
        return _find("SeaBIOS", "auto", SEABIOS_PLACES, "apt-get install seabios")
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
