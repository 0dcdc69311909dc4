"""What a device plugin's ids are on a host: CDI's names, addresses, NVIDIA's numbers; what is left alone."""

import json
import re
from pathlib import Path

import pytest

from rpc.errors import FailedPrecondition, NotFound
from tests.unit.vfio.kernels import Kernel
from tests.unit.vfio.machines import H100, INTEL_PORT, NVME
from tests.unit.vfio.trees import ROOT_PORT, Acs, Tree
from vfio.address import PciAddress
from vfio.allocated import Part, Reader
from vfio.cdinames import Names

GPU, DISK = PciAddress.parse("01:00.0"), PciAddress.parse("02:00.0")


class Host:
    """A GPU and a disk, each in a group of its own, bound to vfio-pci or to the host's drivers."""

    def __init__(self, root: Path, *bound: PciAddress) -> None:
        self.tree = Tree(root)
        bus = self.tree.root_bus(0, 0)
        for _ in range(3):
            self.tree.new_group()  # no number of a group is that of a character device
        for model in (H100, NVME):
            self.tree.function(self.tree.bridge(bus, INTEL_PORT, ROOT_PORT, acs=Acs()), model)
        self.kernel = Kernel(self.tree)
        for address in bound:
            self.kernel._unbind(address, "")
            self.kernel._take(address, "vfio-pci")
        self.cdi = root / "cdi"
        self.cdi.mkdir()

    def group(self, address: PciAddress) -> int:
        return int((self.tree.nodes[address].directory / "iommu_group").readlink().name)

    def name(self, kind: str, name: str, *paths: str) -> None:
        device = {"name": name, "containerEdits": {"deviceNodes": [{"path": path} for path in paths]}}
        text = json.dumps({"cdiVersion": "0.5.0", "kind": kind, "devices": [device]})
        (self.cdi / f"{kind.replace('/', '-')}-{name}.json").write_text(text)

    def reader(self) -> Reader:
        return Reader(Names([str(self.cdi)]), str(self.tree.sys))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path, GPU, DISK)


def test_a_name_of_cdi_stands_for_its_nodes_of_vfio(host: Host) -> None:
    gpu, disk = host.group(GPU), host.group(DISK)
    host.name("example.org/gpu", "first", "/dev/vfio/vfio", f"/dev/vfio/{gpu}", "/dev/null")
    host.name("example.org/gpu", "both", "/dev/iommu", "/dev/vfio/devices/vfio1", f"/dev/vfio/{disk}")
    reader = host.reader()
    assert reader.device("example.org/gpu", "first").parts == (Part(gpu),)
    assert reader.device("example.org/gpu", "both").parts == (Part(None, str(GPU)), Part(disk))
    by_claim = reader.named("example.org/gpu=first")
    assert by_claim is not None
    assert by_claim.parts == (Part(gpu),)
    assert reader.named("example.org/gpu=third") is None


def test_an_address_is_that_device_if_vfio_has_it(tmp_path: Path) -> None:
    """As of the SR-IOV network device plugin, and of NVIDIA's newer one for KubeVirt."""
    reader = Host(tmp_path, GPU).reader()
    assert reader.device("intel.com/sriov", str(GPU)).parts == (Part(None, str(GPU)),)
    for identifier, why in {str(DISK): "its driver is nvme", "0000:77:00.0": "no driver has it"}.items():
        assert (reader.device("intel.com/sriov", identifier).parts) == ()
        assert reader.device("intel.com/sriov", identifier).why == why


def test_nvidias_numbers_are_groups_and_vfio_with_a_number_is_a_device(tmp_path: Path) -> None:
    host = Host(tmp_path, DISK, GPU)  # the GPU is vfio2
    reader, gpu = host.reader(), host.group(GPU)
    assert reader.device("nvidia.com/GH100_H100", str(gpu)).parts == (Part(gpu),)
    assert reader.device("nvidia.com/pgpu", "vfio2").parts == (Part(None, str(GPU)),)
    with pytest.raises(NotFound, match=r"/dev/vfio/devices/vfio77: the host has no such device any more"):
        reader.device("nvidia.com/pgpu", "vfio77")


def test_a_number_that_may_be_a_group_or_a_device_is_refused_without_cdi_and_read_with_it(host: Host) -> None:
    """Ids of NVIDIA's plugin of 2026 are the numbers of vfioN, where there is IOMMUFD: by its CDI file."""
    gpu = host.group(GPU)
    host.tree.link(f"sys/class/vfio-dev/vfio{gpu}", host.kernel.at(DISK, "vfio-dev/vfio2"))
    with pytest.raises(
        FailedPrecondition, match=rf"it may be IOMMU group {gpu}, or .*vfio{gpu}, which is {DISK}"
    ):
        host.reader().device("nvidia.com/pgpu", str(gpu))
    host.name("nvidia.com/pgpu", str(gpu), f"/dev/vfio/devices/vfio{gpu}")
    assert host.reader().device("nvidia.com/pgpu", str(gpu)).parts == (Part(None, str(DISK)),)


def test_what_is_no_device_of_vfios_is_left_alone(host: Host) -> None:
    host.name("nvidia.com/gpu", "GPU-1", "/dev/nvidia0")
    reader, disk = host.reader(), host.group(DISK)
    others = {
        ("nvidia.com/gpu", "GPU-1"): "by .*json it has no node of VFIO's",
        ("nvidia.com/gpu", "GPU-2"): "its id names no CDI device",
        ("nvidia.com/gpu", str(disk)): "its id names no CDI device",  # a disk is none of NVIDIA's
        ("smarter-devices/fuse", str(host.group(GPU))): "its id names no CDI device",
        ("nvidia.com/gpu", "007"): "its id names no CDI device",
        ("example.org/x", ""): "its id names no CDI device",
        ("example.org/x", "../../etc"): "its id names no CDI device",
    }
    for (resource, identifier), why in others.items():
        reading = reader.device(resource, identifier)
        assert reading.parts == ()
        assert re.match(why, reading.why), (identifier, reading.why)


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("/dev/vfio/77", NotFound, "the host has no such device any more"),
        ("/dev/vfio/devices/vfio77", NotFound, "the host has no such device any more"),
        ("/dev/vfio/../../etc/shadow", NotFound, "the host has no such device any more"),
        ("/dev/vfio/noiommu-0", FailedPrecondition, "no IOMMU is before it"),
    ],
)
def test_a_file_of_cdi_that_is_stale_is_an_error(
    host: Host, path: str, error: type[Exception], words: str
) -> None:
    host.name("example.org/gpu", "first", path)
    with pytest.raises(error, match=words):
        host.reader().device("example.org/gpu", "first")


def test_a_group_that_was_taken_from_vfio_is_gone(tmp_path: Path) -> None:
    host = Host(tmp_path, GPU)
    gpu = host.group(GPU)
    host.name("example.org/gpu", "first", f"/dev/vfio/{gpu}")
    assert host.reader().device("example.org/gpu", "first").parts == (Part(gpu),)
    host.kernel._unbind(GPU, "")
    with pytest.raises(NotFound, match=rf"/dev/vfio/{gpu}: the host has no such device any more"):
        host.reader().device("example.org/gpu", "first")
    assert host.reader().device("nvidia.com/pgpu", str(gpu)).parts == ()
