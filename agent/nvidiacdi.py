"""What a container needs of NVIDIA's driver, as a specification of the Container Device Interface (CDI) that
is made of what is there: nodes, libraries, programs, firmware, the environment.

As `nvidia-ctk cdi generate` of the NVIDIA container toolkit makes it, so that containers find what they find
elsewhere; tests/vm/test_nvidia_cdi.py compares the two. Must not know how GPUs came up, nor how a
specification is applied.
"""

from __future__ import annotations

import glob
import os
import stat

from rpc.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    Json = dict[str, Any]

VERSION, KIND = "0.5.0", "nvidia.com/gpu"
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
_PROGRAMS = (
    *("nvidia-smi", "nvidia-debugdump", "nvidia-persistenced"),
    *("nvidia-cuda-mps-control", "nvidia-cuda-mps-server"),
)
_COMMON_NODES = ("nvidia-modeset", "nvidia-uvm-tools", "nvidia-uvm", "nvidiactl")
_OPTIONS = ("ro", "nosuid", "nodev", "rbind", "rprivate")
_OPENCL = "/etc/OpenCL/vendors/nvidia.icd"
# Names that programs load, of libraries that come without them.
_MORE_LINKS = {"libcuda.so": "libcuda.so.1", "libnvidia-opticalflow.so": "libnvidia-opticalflow.so.1"}
HOOK = ("/usr/bin/python3", "-I", "-S", "/usr/lib/casemate/agent/cdihook.pyc")


def specification(minors: Iterable[int], root: str = "") -> Json:
    """Devices are named by their order. root: where all is looked for, the guest's own if empty.

    Raises NotFound where there is no driver, or a node is missing.
    """
    version = driver_version(root)
    devices = [
        {"name": str(index), "containerEdits": {"deviceNodes": [_node(f"/dev/nvidia{minor}", root)]}}
        for index, minor in enumerate(sorted(minors))
    ]
    everything = [node for each in devices for node in each["containerEdits"]["deviceNodes"]]  # type: ignore[index]
    devices.append({"name": "all", "containerEdits": {"deviceNodes": everything}})
    files = [*_libraries(version, root), *_firmware(version, root), *_programs(root)]
    if os.path.exists(root + _OPENCL):
        files.append(_OPENCL)
    mounts = [{"hostPath": path, "containerPath": path, "options": list(_OPTIONS)} for path in files]
    nodes = [f"/dev/{name}" for name in _COMMON_NODES if os.path.exists(f"{root}/dev/{name}")]
    return {
        "cdiVersion": VERSION,
        "kind": KIND,
        "devices": devices,
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void", f"NVIDIA_CTK_LIBCUDA_DIR={LIBRARIES}"],
            "deviceNodes": [_node(path, root) for path in nodes],
            "mounts": mounts,
            "hooks": [_hook(version, root)],
        },
    }


def driver_version(root: str = "") -> str:
    """550.163.01, by the name of libcuda's file."""
    for path in glob.glob(f"{root}{LIBRARIES}/libcuda.so.*.*"):
        return os.path.basename(path).removeprefix("libcuda.so.")
    raise NotFound("this guest image has no NVIDIA driver", hint="casemate image build --variant nvidia")


def _libraries(version: str, root: str) -> list[str]:
    found = sorted(glob.glob(f"{root}{LIBRARIES}/lib*.so.{version}"))
    return [path.removeprefix(root) for path in found if not os.path.islink(path)]


def _links(version: str, root: str) -> Iterator[tuple[str, str]]:
    """(target, path) of every link to one of the libraries, and of those that programs expect beyond."""
    libraries = {os.path.basename(path) for path in _libraries(version, root)}
    directory = f"{root}{LIBRARIES}"
    there = {
        name: os.readlink(f"{directory}/{name}")
        for name in sorted(os.listdir(directory))
        if os.path.islink(f"{directory}/{name}")
    }
    for name, target in there.items():
        if target in libraries or there.get(target) in libraries:
            yield target, f"{LIBRARIES}/{name}"
    for name, target in _MORE_LINKS.items():
        if name not in there and f"{name}.{version}" in libraries:
            yield target, f"{LIBRARIES}/{name}"


def _firmware(version: str, root: str) -> list[str]:
    """Of GPUs' own processors: tools read it, the driver has loaded it itself."""
    found = sorted(glob.glob(f"{root}/lib/firmware/nvidia/{version}/gsp*.bin"))
    return [path.removeprefix(root) for path in found]


def _programs(root: str) -> list[str]:
    return [f"/usr/bin/{name}" for name in _PROGRAMS if os.path.exists(f"{root}/usr/bin/{name}")]


def _node(path: str, root: str) -> Json:
    try:
        found = os.stat(root + path)
    except FileNotFoundError:
        raise NotFound(f"there is no {path} in this guest") from None
    return {
        "path": path,
        "type": "c",
        "major": os.major(found.st_rdev),
        "minor": os.minor(found.st_rdev),
        "fileMode": stat.S_IMODE(found.st_mode),
        "permissions": "rwm",
    }


def _hook(version: str, root: str) -> Json:
    """One process does what nvidia-ctk's hooks create-symlinks, enable-cuda-compat and update-ldcache do."""
    words = [f"--driver={version}", f"--folder={LIBRARIES}"]
    words += [f"--link={target}::{path}" for target, path in _links(version, root)]
    return {"hookName": "createContainer", "path": HOOK[0], "args": [*HOOK, *words]}
