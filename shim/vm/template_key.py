"""What has to be the same for a machine to go on where a template stopped.

Only reads. A difference that is forgotten here ends in QEMU refusing the state, a boot instead, and the
template made anew; so it is what a guest could see and QEMU would not notice that must be here.
"""

import os
from pathlib import Path

from shim.vm.designer import Places, Way
from shim.vm.setting import Setting
from shim.vm.template import key_of
from shim.vm.versions import identity

CPUINFO_BYTES = 8192
_NOWHERE = Places(Path("console"), Path("agent"), Path("share"), Path("ram"))


def template_key(setting: Setting) -> str:
    """The key of the template that a pod's machine may be restored from."""
    return key_of(parts(setting))


def parts(setting: Setting) -> "dict[str, str]":
    return {
        "image": setting.image.digest,
        "domain": setting.design(Way.TEMPLATE, _NOWHERE).xml(),
        "qemu": identity(setting.qemu),
        "firmware": identity(setting.firmware),
        "host": f"{os.uname().release} {cpu_of(Path('/proc/cpuinfo'))}",
        "tenant": setting.request.tenant,
    }


def cpu_of(cpuinfo: Path) -> str:
    """Model, features and microcode of the first CPU, as proc(5) tells them."""
    with cpuinfo.open("rb") as file:
        first = file.read(CPUINFO_BYTES).partition(b"\n\n")[0].decode("ascii", "replace")
    wanted = ("vendor_id", "cpu family", "model", "model name", "stepping", "microcode", "flags")
    lines = (line.partition(":") for line in first.splitlines())
    return " ".join(value.strip() for name, _, value in lines if name.strip() in wanted)
