"""sysfs of a guest with two of AMD's GPUs, and what the kernel and amdgpu do to it, as files."""

import os
from collections.abc import Callable
from pathlib import Path

FIRST, SECOND = "0000:02:00.0", "0000:83:00.0"
DRM, KFD = 226, 235
"""Major numbers: the first is the same everywhere (Documentation/admin-guide/devices.txt)."""


class Guest:
    def __init__(self, root: Path) -> None:
        self.sys = root / "sys"
        for directory in ("bus/pci/devices", "bus/pci/drivers/amdgpu", "class/drm", "class/kfd"):
            (self.sys / directory).mkdir(parents=True)
        self._plug(FIRST, "00:06.0")
        self._plug(SECOND, "00:06.1")
        self.at_load: list[Callable[[], None]] = []
        """What happens while the module is loaded."""
        self.loaded = 0

    def _plug(self, address: str, port: str) -> None:
        at = self.sys / f"devices/pci0000:00/0000:{port}" / address
        at.mkdir(parents=True)
        (at / "vendor").write_text("0x1002\n")
        (at / "modalias").write_text("pci:v00001002d000074A1\n")
        for directory in (at, at.parent):
            (self.sys / "bus/pci/devices" / directory.name).symlink_to(directory)

    def gpu(self, address: str) -> Path:
        return self.sys / "bus/pci/devices" / address

    def load(self, name: str) -> None:
        assert name == "amdgpu"
        self.loaded += 1
        for step in self.at_load:
            step()

    def begin(self, major: int = KFD) -> None:
        """/dev/kfd, and KFD's topology, in which the processor is a node, too."""
        self.kfd_node({"drm_render_minor": 0, "location_id": 0, "domain": 0, "simd_count": 0})
        (self.sys / "class/kfd/kfd/dev").write_text(f"{major}:0\n")

    def take(self, address: str) -> None:
        (self.gpu(address) / "driver").symlink_to(self.sys / "bus/pci/drivers/amdgpu")

    def initialise(self, address: str, number: int) -> None:
        self.drm(self.gpu(address).resolve() / "drm", number)
        bus = int(address[5:7], 16)
        self.kfd_node({"drm_render_minor": 128 + number, "location_id": bus << 8, "domain": 0})

    def bring_up(self, address: str, number: int) -> None:
        self.take(address)
        self.initialise(address, number)

    def drm(self, directory: Path, number: int) -> None:
        """The nodes of one device of DRM; a card has connectors, and files that are no nodes."""
        for name, minor in ((f"card{number}", number), (f"renderD{128 + number}", 128 + number)):
            (directory / name).mkdir(parents=True)
            (directory / name / "dev").write_text(f"{DRM}:{minor}\n")
            there = os.path.relpath(directory / name, self.sys / "class/drm")  # as the kernel's links are
            (self.sys / "class/drm" / name).symlink_to(there)
        (directory / f"card{number}" / f"card{number}-DP-1/drm_dp_aux0").mkdir(parents=True)
        (directory / f"card{number}" / f"card{number}-DP-1/drm_dp_aux0/dev").write_text("249:0\n")

    def partition(self, address: str, index: int, number: int) -> None:
        """As a platform's device; only KFD's topology says of which GPU."""
        self.drm(self.sys / f"devices/platform/amdgpu_xcp_{number}/drm", number)
        location = int(address[5:7], 16) << 8 | index
        self.kfd_node({"drm_render_minor": 128 + number, "location_id": location, "domain": 0})

    def kfd_node(self, properties: dict[str, int]) -> None:
        nodes = self.sys / "class/kfd/kfd/topology/nodes"
        nodes.mkdir(parents=True, exist_ok=True)
        node = nodes / str(len(list(nodes.iterdir())))
        node.mkdir()
        (node / "properties").write_text("".join(f"{name} {value}\n" for name, value in properties.items()))
