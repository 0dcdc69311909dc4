"""What the shim says of itself before any container: the Features that `-info` carries.

runtime-spec, features.md; by it containerd tells the kubelet what pods of this handler may ask for. Only
what is so is listed: who asks for more is refused by shim/spec.py.
"""

import json
from typing import Any as Json

from rpc.api.types import Any
from shim.hookserver import HOST_HOOKS
from shim.spec import GUEST_HOOKS, GUEST_NAMESPACES

TYPE_URL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
"""containerd's typeurl of the Go type, whose value is JSON."""
MOUNT_OPTIONS = (
    "bind",
    "idmap",
    "nodev",
    "noexec",
    "nosuid",
    "private",
    "rbind",
    "ridmap",
    "ro",
    "rprivate",
    "rro",
    "rw",
)
"""Of a volume. With ro as with rro, all that lies below it is read-only as well."""
OFF: dict[str, Json] = {"enabled": False}


def features() -> Any:
    document: dict[str, Json] = {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": sorted(HOST_HOOKS | GUEST_HOOKS),
        "mountOptions": list(MOUNT_OPTIONS),
        "linux": {
            "namespaces": sorted({*GUEST_NAMESPACES, "network"}),
            "apparmor": OFF,
            "selinux": OFF,
            "intelRdt": OFF,
            "mountExtensions": {"idmap": {"enabled": True}},
        },
    }
    return Any(type_url=TYPE_URL, value=json.dumps(document).encode())
