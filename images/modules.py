"""Kernel modules for a guest: which ones, in which order, decompressed.

The guest has no modprobe: it reads modules.txt, written here. Must not know what is done with the files.
"""

import lzma
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from images.run import run
from rpc.errors import FailedPrecondition

BOOT = ("virtio_blk", "erofs")  # what mounting the root needs

# feature of the guest -> modules that give it; a module that the kernel has built in needs no file
FEATURES: Mapping[str, tuple[str, ...]] = {
    "serial": ("virtio_console",),
    "vsock": ("vmw_vsock_virtio_transport",),
    "virtiofs": ("virtiofs",),
    "9p": ("9p", "9pnet_fd"),
    "overlay": ("overlay",),
    "ext4": ("ext4",),
    "net": ("virtio_net",),
    "rng": ("virtio-rng",),
    "balloon": ("virtio_balloon",),
    "mem": ("virtio_mem",),
    "nvme": ("nvme",),
    "pmem": ("virtio_pmem", "nd_pmem"),
    "tun": ("tun",),
    "veth": ("veth",),
    "fuse": ("fuse",),
    # Of variants. No kernel of Debian's has NVIDIA's, and amdgpu only the generic one.
    "nvidia": ("nvidia", "nvidia_uvm", "nvidia_modeset"),
    "amdgpu": ("amdgpu",),
    # Network cards that a guest is given of the host's, most of them virtual functions.
    "igbvf": ("igbvf",),
    "ixgbevf": ("ixgbevf",),
    "iavf": ("iavf",),
    "mlx5": ("mlx5_core",),
    "mlx5-rdma": ("mlx5_ib", "rdma_ucm"),
}
# Of these, the module whose aliases say which devices of PCI are its.
DRIVERS: Mapping[str, str] = {
    "nvme": "nvme",
    "igbvf": "igbvf",
    "ixgbevf": "ixgbevf",
    "iavf": "iavf",
    "mlx5": "mlx5_core",
}
# What modules ask for by the name of what is done, not of who does it: libcrc32c cannot be loaded without.
_BY_WHOM = {"crc32c": "crc32c_generic", "crypto-crc32c": "crc32c_generic"}
_SOFT = re.compile(rb"\0softdep=pre: ([^\0]+?)(?: post: [^\0]*)?(?=\0)")
_ALIAS = re.compile(rb"\0alias=(pci:[^\0 ]+)(?=\0)")
_SIGNATURE = b"~Module signature appended~\n"
_SIGNATURE_INFO_BYTES = 12  # struct module_signature; its last four bytes are the signature's length


@dataclass(frozen=True, slots=True)
class Module:
    name: str
    content: bytes


class ModuleTree:
    """The modules of one kernel as its package installs them (/usr/lib/modules/RELEASE).

    others: files of modules that were built for it.
    """

    def __init__(self, directory: Path, others: Iterable[Path] = ()) -> None:
        self._directory = directory
        own = (path for path in sorted((directory / "kernel").rglob("*.ko*")) if path.is_file())
        self._files = {_name(path): path for path in (*own, *others)}
        builtin = (directory / "modules.builtin").read_text().split()
        self._builtin = {_name(Path(line)) for line in builtin}

    def has(self, name: str) -> bool:
        return _normal(name) in self._files or self.is_builtin(name)

    def is_builtin(self, name: str) -> bool:
        return _normal(name) in self._builtin

    def load_order(self, names: Iterable[str]) -> list[Module]:
        """The named modules and what they depend on, each once, dependencies first; soft ones (modprobe.d(5))
        as far as the kernel has them."""
        found: dict[str, Module] = {}
        for name in names:
            self._collect(_normal(name), found, ())
        return list(found.values())

    def _collect(self, name: str, found: dict[str, Module], via: tuple[str, ...]) -> None:
        if name in found or self.is_builtin(name):
            return
        if name in via:
            raise FailedPrecondition(
                f"kernel modules depend on each other in a circle: {' '.join((*via, name))}"
            )
        if name not in self._files:
            needed = f", which {via[-1]} needs" if via else ""
            raise FailedPrecondition(f"the kernel has no module {name}{needed}")
        content = unsigned(_read(self._files[name]))
        for dependency in _dependencies(content):
            self._collect(_normal(dependency), found, (*via, name))
        for wish in _soft_dependencies(content):
            if self.has(wish):
                self._collect(_normal(wish), found, (*via, name))
        found[name] = Module(name, content)


def feature_list(tree: ModuleTree, directory: str) -> tuple[str, dict[str, bytes]]:
    """The text of modules.txt, and the files it names (name -> content).

    One line per feature: "FEATURE: PATH PATH ...", in load order; no path if it is built in. A
    feature that the kernel does not have at all has no line.
    """
    lines: list[str] = []
    files: dict[str, bytes] = {}
    for feature, names in FEATURES.items():
        if not all(tree.has(name) for name in names):
            continue
        order = tree.load_order(names)
        files |= {f"{module.name}.ko": module.content for module in order}
        lines.append(" ".join([f"{feature}:", *(f"{directory}/{module.name}.ko" for module in order)]))
    return "".join(f"{line}\n" for line in lines), files


def driver_list(tree: ModuleTree) -> str:
    """The text of drivers.txt: which feature has the driver for which devices.

    "pci:v00008086d*sv*sd*bc*sc*i* FEATURE" a line, a pattern of modalias (modules.alias(5) has such). Of a
    driver that is built in there is none: it takes its devices by itself.
    """
    lines: list[str] = []
    for feature, name in DRIVERS.items():
        if tree.has(name) and not tree.is_builtin(name):
            content = tree.load_order([name])[-1].content
            lines += [f"{found.decode()} {feature}" for found in _ALIAS.findall(content)]
    return "".join(f"{line}\n" for line in lines)


def unsigned(module: bytes) -> bytes:
    """A module without the signature that is appended to it.

    Checking it costs an emulated guest 10 ms per module and proves nothing here: whoever could
    change a module in the image could change the kernel next to it. The store verifies both.
    """
    if not module.endswith(_SIGNATURE):
        return module
    end = len(module) - len(_SIGNATURE)
    length = int.from_bytes(module[end - 4 : end], "big")
    return module[: end - _SIGNATURE_INFO_BYTES - length]


def _dependencies(module: bytes) -> Iterator[str]:
    """From the "depends=a,b" string of the section .modinfo (strings that end with NUL)."""
    start = module.find(b"\0depends=")
    if start < 0:
        raise FailedPrecondition("a kernel module lists no dependencies: is it a module?")
    end = module.index(b"\0", start + 1)
    listed = module[start + len(b"\0depends=") : end].decode()
    yield from filter(None, listed.split(","))


def _soft_dependencies(module: bytes) -> Iterator[str]:
    """Those that are to be there before it, from "softdep=pre: a b" strings of the same section."""
    for listed in _SOFT.findall(module):
        for name in listed.decode().split():
            yield _BY_WHOM.get(name, name)


def _read(path: Path) -> bytes:
    content = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(content)
        case ".zst":
            return run(["zstd", "-dcq"], stdin=content, package="zstd")
        case _:
            return content


def _name(path: Path) -> str:
    return _normal(path.name.split(".ko")[0])


def _normal(name: str) -> str:
    return name.replace("-", "_")
