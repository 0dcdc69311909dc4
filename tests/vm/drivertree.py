"""NVIDIA's driver in a directory as a guest with GPUs has it: files of Debian's packages, nodes by hand."""

import os
import stat
from pathlib import Path

from images.nvidia import driver as nvidia

GPUS = 2
NODES = {
    "nvidiactl": (195, 255),
    "nvidia-modeset": (195, 254),
    "nvidia-uvm": (237, 0),
    "nvidia-uvm-tools": (237, 1),
    **{f"nvidia{minor}": (195, minor) for minor in range(GPUS)},
}


def make(root: Path) -> Path:
    nvidia.add(nvidia.without_modules("trixie"), root)
    (root / "lib").symlink_to("usr/lib")
    (root / "dev").mkdir()
    for name, number in NODES.items():
        os.mknod(root / "dev" / name, stat.S_IFCHR | 0o666, os.makedev(*number))
        (root / "dev" / name).chmod(0o666)
    return root
