"""A guest with AMD's driver, and with an old GPU of AMD's that it leaves to others: what amdgpu and KFD do
without one of theirs, and what a container reaches that has some.

The image takes packages that no other test does, so these are skipped where nobody has fetched them:
`casemate image build --variant amd`, or CASEMATE_TEST_VARIANT=amd, does (CONTRIBUTING.md). What only a GPU
can show is in docs/gpus.md.
"""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import amd, boot, cdi
from images.amd import driver
from images.image import GuestImage
from images.variant import Variant
from rpc.api import agent as api
from tests.unit.agent import amdguest
from tests.vm import agentvm, variants
from tests.vm.agentvm import AgentVM
from tests.vm.pods import Pods

PROFILE = """\
[profiles.default]
image = "default-amd"
"""
PORT = "10.0"
NAME = "0000:3b:00.0"
# QEMU's Rage 128 has AMD's vendor id, and amdgpu is asked about it: it leaves such to older drivers.
RAGE = (
    *("-device", json.dumps({"driver": "pcie-root-port", "id": "slot16", "bus": "pcie.0", "addr": PORT})),
    *("-device", json.dumps({"driver": "ati-vga", "bus": "slot16", "rombar": 0})),
)
STATE = """\
cd /guest/sys/class/kfd/kfd
echo numbers $(cat dev)
echo nodes $(ls topology/nodes)
echo node $(stat -c "%F %a" /guest/dev/kfd)
echo drivers $(ls /guest/sys/bus/pci/drivers/amdgpu)
echo modules $(cut -d " " -f 1 /guest/proc/modules)
/guest/usr/bin/busybox dmesg
"""
# ENODEV: the container may have it, and the guest has not. EPERM: the container may not.
REACH = """\
for node in /dev/kfd /dev/dri/*; do echo node $(stat -c "%n 0x%t 0x%T %a" $node); done
tried="/dev/kfd /dev/dri/renderD128"
if [ $(id -u) = 0 ]; then mknod /dev/another c 226 129; tried="$tried /dev/another"; fi
for node in $tried; do
    if said=$( (exec 3<>$node) 2>&1 ); then echo open; else echo $said; fi
done
"""


@pytest.fixture(scope="module")
def image(image_store: Path) -> GuestImage:
    return variants.image(Variant.AMD, image_store, kept=driver.kept())


@pytest.fixture(scope="module")
def vm(image: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentVM]:
    directory = tmp_path_factory.mktemp("amd")
    with AgentVM(image, agentvm.make_disk(directory), directory, options=RAGE) as vm:
        vm.run(vm.begin())
        yield vm


@pytest.fixture(scope="module")
def rage(vm: AgentVM) -> api.FoundDevice:
    """What the agent found, once it has loaded amdgpu for it."""
    wanted = api.PciDevice(name=NAME, port=f"00:{PORT}", function=0, kind="gpu", node=-1)
    request = api.DevicesRequest(devices=[wanted], limit_ms=90_000)
    (found,) = vm.run(vm.client.call(api.DEVICES, request, timeout_s=110)).devices
    return found


@pytest.fixture(scope="module")
def state(vm: AgentVM, rage: api.FoundDevice) -> str:
    """Of the guest's kernel, as a container sees it that may see everything."""
    what = agentvm.privileged("sh", "-c", STATE)
    status, out, err = vm.run(vm.once("state", what))
    assert status == 0, (out, err)
    return out.decode()


def words(state: str, of: str) -> list[str]:
    (line,) = (line for line in state.splitlines() if line.startswith(f"{of} "))
    return line.split()[1:]


def test_a_gpu_that_is_not_amdgpus_names_itself_with_the_kernels_words(rage: api.FoundDevice) -> None:
    assert rage.problem == f"GPU {rage.address} is none that amdgpu brings up"
    assert (rage.driver, rage.nodes) == ("", [])
    assert [line for line in rage.words if "amdgpu" in line or rage.address in line] == rage.words
    assert any("amdgpu" in line for line in rage.words)


def test_amdgpu_is_loaded_with_all_that_it_takes(state: str) -> None:
    assert {"amdgpu", "amdxcp", "drm", "ttm", "gpu_sched"} <= set(words(state, "modules"))
    assert "new_id" in words(state, "drivers")  # the driver is registered
    assert "Unknown symbol" not in state
    assert "disagrees about version" not in state


def test_there_is_one_kfd_with_the_processor_in_its_topology(state: str) -> None:
    assert words(state, "nodes") == ["0"]
    assert words(state, "node")[:3] == ["character", "special", "file"]


@pytest.mark.parametrize("user", [1000, 0])
def test_a_container_reaches_kfd_and_its_own_gpu_alone(
    vm: AgentVM, state: str, user: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made for it is applied in a real guest, of which only the GPUs are missing."""
    (numbers,) = words(state, "numbers")
    major = int(numbers.partition(":")[0])
    guest = amdguest.Guest(tmp_path)
    guest.begin(major)
    monkeypatch.setattr(boot, "load_feature", guest.load)
    made = amd.Driver(str(guest.sys))
    for number, address in enumerate((amdguest.FIRST, amdguest.SECOND)):
        guest.bring_up(address, number)

    async def both() -> None:
        for address in (amdguest.FIRST, amdguest.SECOND):
            await made.come_up(str(guest.gpu(address)), 10.0)

    asyncio.run(both())
    specification, names = made.specification()
    what = agentvm.spec(
        *("sh", "-c", REACH),
        user={"uid": user, "gid": user},
        resources={"devices": [{"allow": False, "access": "rwm"}]},  # as clients begin
        capabilities=dict.fromkeys(("bounding", "effective", "permitted"), [] if user else ["CAP_MKNOD"]),
    )
    cdi.apply(what, specification, [names[amdguest.FIRST]])
    status, out, err = vm.run(vm.once(f"reach{user}", what))
    assert status == 0, (out, err)
    nodes, (kfd, own, *another) = (lines := out.decode().splitlines())[:3], lines[3:]
    assert nodes == [
        f"node /dev/kfd 0x{major:x} 0x0 666",
        "node /dev/dri/card0 0xe2 0x0 666",
        "node /dev/dri/renderD128 0xe2 0x80 666",
    ]
    assert kfd == "open"
    assert own.endswith("No such device")
    assert ["Operation not permitted" in each for each in another] == [True] * (user == 0)


def test_a_pod_without_a_gpu_runs_on_its_kernel_and_has_nothing_of_it_loaded(
    pods: Pods, image: GuestImage
) -> None:
    pods.ctr.instance.configure(PROFILE)
    release, *modules = (
        pods.run("sh", "-c", "cat /proc/sys/kernel/osrelease; cut -d ' ' -f 1 /proc/modules").ok().out.split()
    )
    assert release == image.manifest["kernel"]
    assert "erofs" in modules
    assert not {"amdgpu", "drm"} & set(modules)
