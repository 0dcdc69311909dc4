"""What libvirt knows of CPU models: nothing, where a machine names none of them.

In every process libvirt reads the models of all CPUs that it knows, and looks for the one that is most like
the host's, before it starts anything: up to two thirds of its own work for a start. A machine that has the
host's CPU as it is, or all that QEMU can emulate, needs none of it.
"""

import os
import re
from pathlib import Path

from shim import system

NAMELESS = ("host-passthrough", "maximum")
# cpu/cpu_map.c of libvirt: files that the index names are looked for beside it.
INDEX = Path("/usr/share/libvirt/cpu_map/index.xml")
NEEDED = ("x86_vendors.xml", "x86_features.xml")
LEAN_INDEX = (
    "<cpus><arch name='x86'>"
    + "".join(f"<include filename='{name}'/>" for name in NEEDED)
    + "</arch></cpus>\n"
)
# Of the file that libvirt keeps of a QEMU (virQEMUCapsFormatCache), an element a line: models, and types of
# machines of which none of ours is.
_LEFT_OUT = re.compile(
    rb"^ *<cpu (?:[^>]*/>|[^>]*[^/>]>.*?</cpu>)\n|^ *<machine (?![^>]*q35)[^>]*/>\n", re.DOTALL | re.MULTILINE
)


def hide(directory: Path) -> None:
    """For libvirt in this mount namespace. directory: the pod's. Raises OSError."""
    if not all(os.path.isfile(path) for path in (INDEX, *(INDEX.with_name(name) for name in NEEDED))):
        return
    lean = directory / "cpu-models.xml"
    lean.write_text(LEAN_INDEX)
    system.mount(str(lean), str(INDEX), None, system.MS_BIND)


def without_models(capabilities: bytes) -> bytes:
    """What libvirt keeps of a QEMU, without its CPU models and most types of machines."""
    return _LEFT_OUT.sub(b"", capabilities)
