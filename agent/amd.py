"""AMD's GPUs in this guest: amdgpu loaded, which nodes are whose, and what a container needs, as a
specification of the Container Device Interface (CDI).

Imported by guests that were given such a GPU alone. A container's image has all of ROCm: it needs nodes, and
nothing else of the guest. Must not know how a specification is applied.
"""

from __future__ import annotations

import asyncio
import os
import re
from functools import partial

from agent import boot
from agent.files import read
from agent.progress import while_moving
from agent.threads import in_thread
from agent.uevents import appearance
from rpc.errors import FailedPrecondition, NotFound, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    Json = dict[str, Any]
    Node = tuple[str, int, int]  # its path below /dev, its numbers

FEATURE, DRIVER = "amdgpu", "amdgpu"
VERSION, KIND = "0.5.0", "amd.com/gpu"
KFD = "kfd"
# Who may use a GPU is a matter of who has its node. Elsewhere udev gives such nodes this mode, or a group
# (render), whose number differs from one container's image to the next.
_MODE = 0o666
_NODE = re.compile(r"card\d+|renderD\d+")
_MOST_KFD_NODES = 1024


class Driver:
    """amdgpu in one guest. sysfs: where it is looked at."""

    says: tuple[str, ...] = ("amdgpu", "kfd")  # what lines in the kernel's log have that matter

    def __init__(self, sysfs: str = "/sys") -> None:
        self._sysfs = sysfs
        self._kfd = f"{sysfs}/class/kfd/kfd"
        self._loading: asyncio.Task[None] | None = None
        self._up: set[str] = set()

    async def come_up(self, directory: str, limit_s: float) -> None:
        """The GPU of this directory of sysfs is amdgpu's, and has a render node. /dev/kfd is there.

        limit_s: of each GPU of the machine. Raises FailedPrecondition where amdgpu cannot be loaded or does
        not take it, Unavailable where that takes too long, with what was waited for.
        """
        address = os.path.basename(directory)
        try:
            await self._load(limit_s)
            if not self._has_driver(address):
                raise FailedPrecondition(f"GPU {address} is none that amdgpu brings up")
            what = f"render node of GPU {address}"
            await appearance(lambda: self._renders(address) or None, what, limit_s)
        except TimeoutError:
            # If this one is ready, amdgpu is busy with another, which says so itself.
            if not self._renders(address):
                late = "initialise it" if self._has_driver(address) else "come to it"
                raise Unavailable(f"GPU {address}: amdgpu did not {late} within {limit_s:g} s") from None
        if self._node(KFD, self._kfd) is None:
            raise FailedPrecondition(f"GPU {address}: amdgpu made no /dev/kfd, which ROCm takes")
        self._up.add(address)

    async def _load(self, limit_s: float) -> None:
        """Devices are there since the machine's start, and the kernel is not done with loading before amdgpu
        has initialised each, one after the other, or has given up on it.

        Raises TimeoutError once it has not got on with any for limit_s.
        """
        if self._loading is None:
            self._loading = asyncio.create_task(in_thread(partial(boot.load_feature, FEATURE)))
        await while_moving(self._loading, self._count_renders, limit_s)

    def nodes(self, address: str) -> list[str]:
        """Of a GPU, below /dev: its own, those of its partitions, and kfd, if it is among KFD's."""
        paths = [path for path, *_ in self._drm_nodes(address)]
        return [*paths, KFD] if self._render_minors(address) else paths

    def specification(self) -> tuple[Json, dict[str, str]]:
        """What containers need, and what it calls each GPU, by the address: devices are named by their order,
        as `amd-ctk cdi generate` of AMD's container toolkit names them. What GPUs there are is as of now: who
        changes how one is divided changes its nodes.

        Raises NotFound for a GPU that has none any more.
        """
        shared = self._node(KFD, self._kfd)
        if shared is None:
            raise NotFound("there is no /dev/kfd in this guest any more")
        names = {address: str(index) for index, address in enumerate(sorted(self._up))}
        devices = []
        for address, name in names.items():
            nodes = [_edit(node) for node in self._drm_nodes(address)]
            if not nodes:
                raise NotFound(f"GPU {address} has no nodes in this guest any more")
            devices.append({"name": name, "containerEdits": {"deviceNodes": nodes}})
        edits = {"deviceNodes": [_edit(shared)]}
        return {"cdiVersion": VERSION, "kind": KIND, "devices": devices, "containerEdits": edits}, names

    def _directory(self, address: str) -> str:
        return f"{self._sysfs}/bus/pci/devices/{address}"

    def _has_driver(self, address: str) -> bool:
        """Also while amdgpu initialises it; not after it has given up."""
        try:
            return os.path.basename(os.readlink(f"{self._directory(address)}/driver")) == DRIVER
        except FileNotFoundError:
            return False

    def _renders(self, address: str) -> list[str]:
        """Render nodes of the GPU itself, which it has once it is initialised."""
        nodes = self._in(f"{self._directory(address)}/drm")
        return [path for path, *_ in nodes if path.startswith("dri/renderD")]

    def _count_renders(self) -> int:
        """Of all GPUs."""
        try:
            names = os.listdir(f"{self._sysfs}/class/drm")
        except FileNotFoundError:  # before amdgpu's first word
            return 0
        return sum(name.startswith("renderD") for name in names)

    def _drm_nodes(self, address: str) -> list[Node]:
        """Of the GPU, and of its partitions, whose devices are no children of its own in sysfs."""
        found = set(self._in(f"{self._directory(address)}/drm"))
        for minor in self._render_minors(address):
            try:
                link = os.readlink(f"{self._sysfs}/class/drm/renderD{minor}")
            except FileNotFoundError:  # it has just gone
                continue
            found.update(self._in(f"{self._sysfs}/class/drm/{os.path.dirname(link)}"))
        return sorted(found)

    def _in(self, directory: str) -> Iterator[Node]:
        """What a directory `drm` of a device has."""
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return
        for name in names:
            if _NODE.fullmatch(name) and (node := self._node(f"dri/{name}", f"{directory}/{name}")):
                yield node

    def _node(self, path: str, directory: str) -> Node | None:
        """None of one that is not there, or not any more."""
        try:
            major, _, minor = read(f"{directory}/dev").decode().partition(":")
        except OSError:
            return None
        return path, int(major), int(minor)

    def _render_minors(self, address: str) -> list[int]:
        """By KFD's topology, the minor numbers of what is on this GPU: one, or one for each partition, which
        KFD numbers in the bits of the function (kfd_topology_add_device in drivers/gpu/drm/amd/amdkfd)."""
        domain, bus, slot = (int(word, 16) for word in address.partition(".")[0].split(":"))
        found = []
        try:
            names = os.listdir(f"{self._kfd}/topology/nodes")
        except FileNotFoundError:
            return []
        for name in names[:_MOST_KFD_NODES]:
            try:
                text = read(f"{self._kfd}/topology/nodes/{name}/properties").decode()
            except OSError:  # it has just gone
                continue
            fields = {name: value for name, _, value in (line.partition(" ") for line in text.splitlines())}
            minor = int(fields.get("drm_render_minor", 0))  # a CPU's is 0
            at = (int(fields.get("domain", 0)), int(fields.get("location_id", 0)) >> 3)
            if minor > 0 and at == (domain, bus << 5 | slot):
                found.append(minor)
        return sorted(found)


def _edit(node: Node) -> Json:
    path, major, minor = node
    numbers = {"type": "c", "major": major, "minor": minor}
    return {"path": f"/dev/{path}", **numbers, "fileMode": _MODE, "permissions": "rwm"}
