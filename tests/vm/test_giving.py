"""Devices to vfio-pci, reset, and back, on a real kernel in a machine that plays the host (hostscan.py)."""

import pytest

from images.builder import KERNEL_PACKAGES, PACKAGES
from images.kernel import KernelKind, find_kernel
from images.modules import ModuleTree
from images.packages import Request, fetch
from tests.vm import hostscan
from tests.vm.hostgive import Seen

MODULES = ("vfio_iommu_type1", "vfio-pci")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    directory = tmp_path_factory.mktemp("giving")
    kernel = find_kernel(fetch(Request((*PACKAGES, *KERNEL_PACKAGES[KernelKind.CLOUD]))).path)
    (directory / "disk").write_bytes(bytes(4 << 20))
    devices = [
        *("-device", "intel-iommu,intremap=on"),
        *("-device", "pcie-root-port,id=one,bus=pcie.0,chassis=1,slot=1"),
        *("-drive", f"if=none,id=disk,file={directory}/disk,format=raw"),
        *("-device", "nvme,serial=a,drive=disk,bus=one"),
        *("-device", "pcie-root-port,id=two,bus=pcie.0,chassis=2,slot=2"),
        *("-device", "edu,bus=two"),
    ]
    modules = ModuleTree(kernel.modules).load_order(MODULES)
    seen = hostscan.boot(kernel.image, directory, devices, "intel_iommu=on", "hostgive", modules)
    assert isinstance(seen, Seen)
    return seen


def test_both_go_to_vfio_and_the_one_with_a_driver_goes_back_to_it(seen: Seen) -> None:
    assert seen.drivers["before"] == ["nvme", ""]
    assert seen.drivers["bound"] == ["vfio-pci", "vfio-pci"]
    assert seen.drivers["given back"] == ["nvme", ""]


def test_what_a_machine_would_open_is_there(seen: Seen) -> None:
    assert seen.claim is not None
    assert [node.address for node in seen.nodes] == list(seen.claim.addresses)
    assert set(seen.opens.values()) == {True}
    assert len({node.group for node in seen.nodes}) == 2


def test_the_hosts_disk_goes_and_comes_again(seen: Seen) -> None:
    assert "nvme0n1" in seen.disks["before"]
    assert not any(name.startswith("nvme") for name in seen.disks["bound"])


def test_both_were_reset_and_are_free(seen: Seen) -> None:
    assert seen.failed["first"] == {}
    assert seen.states["bound"] == ["in use", "in use"]
    assert seen.states["given back"] == ["free", "free"]
    first = [entry for entry in seen.log if entry.pod is not None and entry.pod.id == "first"]
    resets = sorted(entry.detail.split()[0] for entry in first if entry.cause.value == "reset")
    assert resets == ["bus", "flr"]  # edu cannot be reset but with its port; QEMU's nvme can


def test_the_kernels_list_of_resets_is_as_it_was(seen: Seen) -> None:
    before = {name: words for name, words in seen.resets.items() if not name.endswith("after")}
    assert all(words for words in before.values())
    assert {name: seen.resets[f"{name} after"] for name in before} == before


def test_one_that_is_pulled_out_is_quarantined_until_it_is_cleared(seen: Seen) -> None:
    ((address, reason),) = seen.failed["second"].items()
    assert reason == f"device {address} is not there any more"
    assert seen.states["pulled out"] == ["quarantined", "free"]
    assert seen.cleared == reason
    assert seen.states["put in"] == ["free", "free"]
    assert seen.drivers["put in"] == ["nvme", ""]  # put in anew, it has no override
