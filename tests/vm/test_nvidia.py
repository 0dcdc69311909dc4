"""A guest with NVIDIA's driver and without a GPU, in which its modules load as far as that goes; and one with
what they take for GPUs, and cannot initialise.

Building the modules takes minutes, so these tests are skipped where nobody has: `casemate image build
--variant nvidia`, or CASEMATE_TEST_VARIANT=nvidia, builds them (CONTRIBUTING.md). What only a GPU can show is
in docs/gpus.md.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import cdi, nvidiacdi
from images.image import GuestImage
from images.nvidia import modules
from images.variant import Variant
from rpc.api import agent as api
from tests.testbed.fakegpu import A6000, H100
from tests.vm import agentvm, drivertree, knowngpu, variants
from tests.vm.agentvm import AgentVM

# As a program would: by the links, and by the loader's cache.
LOOK = """\
cd /usr/lib/x86_64-linux-gnu
stat -L -c %s libcuda.so
ls /usr/bin/nvidia-smi
echo $(cd /dev; ls -d nvidia*)
echo $(readlink libcuda.so) $(readlink libcuda.so.1)
grep -c libcuda.so.1 /etc/ld.so.cache
echo $NVIDIA_VISIBLE_DEVICES
if touch /written 2>/dev/null; then echo yes; else echo no; fi
"""
STATE = """\
cd /guest/proc/driver/nvidia
cat gpus/*/information params /guest/proc/devices /guest/proc/modules
/guest/usr/bin/busybox dmesg
cd /guest/dev
for node in nvidia[0-9c-z-]* nvidia-caps/*; do
    if [ -c $node ]; then
        echo node $node: $(printf "%d %d" $(stat -c "0x%t 0x%T" $node)) $(stat -c %a $node)
    fi
done
"""
LOAD = """\
/guest/usr/bin/busybox insmod /guest/usr/lib/modules/nvidia.ko NVreg_ModifyDeviceFiles=0 2>&1
/guest/usr/bin/busybox dmesg
"""


@pytest.fixture(scope="module")
def image(image_store: Path) -> GuestImage:
    return variants.image(Variant.NVIDIA, image_store, kept=modules.kept())


@pytest.fixture(scope="module")
def vm(image: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentVM]:
    directory = tmp_path_factory.mktemp("nvidia")
    with AgentVM(image, agentvm.make_disk(directory), directory) as vm:
        vm.run(vm.begin())
        yield vm


def test_the_modules_load_and_find_no_gpu(vm: AgentVM, image: GuestImage) -> None:
    what = agentvm.privileged("/guest/usr/bin/busybox", "sh", "-c", LOAD)
    status, out, err = vm.run(vm.once("load", what))
    said = out.decode()
    assert status == 0, (said, err)
    assert "No such device" in said  # ENODEV: the module's own answer, once all of its symbols were found
    assert "NVRM: No NVIDIA GPU found." in said
    assert "Unknown symbol" not in said
    assert "disagrees about version" not in said


@pytest.mark.parametrize("readonly", [True, False], ids=["readonly", "writable"])
def test_a_container_finds_the_libraries_by_the_names_that_programs_load(
    vm: AgentVM, tmp_path: Path, readonly: bool
) -> None:
    """What is made for it is applied in a real guest, of which only the GPU is missing."""
    tree = drivertree.make(tmp_path)
    made = nvidiacdi.specification(range(drivertree.GPUS), str(tree))
    what = agentvm.spec("sh", "-c", LOOK)
    what["root"]["readonly"] = readonly
    cdi.apply(what, made, ["1"])
    status, out, err = vm.run(vm.once(f"look-{readonly}".lower(), what))
    assert status == 0, (out, err)
    libraries, smi, devices, links, cached, env, written = out.decode().splitlines()
    version = nvidiacdi.driver_version(str(tree))
    assert int(libraries) == (tree / f"{nvidiacdi.LIBRARIES.lstrip('/')}/libcuda.so.{version}").stat().st_size
    assert smi == "/usr/bin/nvidia-smi"
    assert devices == "nvidia-modeset nvidia-uvm nvidia-uvm-tools nvidia1 nvidiactl"
    assert links == f"libcuda.so.1 libcuda.so.{version}"
    assert int(cached) > 0
    assert env == "void"
    assert written == ("no" if readonly else "yes")


# --- with what the driver takes for GPUs ---


@pytest.fixture(scope="module")
def gpus(image: GuestImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentVM]:
    qemu = knowngpu.qemu()
    if qemu is None:
        pytest.skip("a QEMU with vfio-user is needed, and no test bed was built, which has one")
    directory = tmp_path_factory.mktemp("gpus")
    with (
        knowngpu.plugged(directory, [H100, A6000]) as options,
        AgentVM(image, agentvm.make_disk(directory), directory, options=options, qemu=qemu) as vm,
    ):
        vm.run(vm.begin())
        yield vm


@pytest.fixture(scope="module")
def found(gpus: AgentVM) -> dict[str, api.FoundDevice]:
    wanted = [
        api.PciDevice(name=name, port=f"00:{knowngpu.port(number)}", function=0, kind="gpu", node=-1)
        for number, name in enumerate(("h100", "a6000"))
    ]
    request = api.DevicesRequest(devices=wanted, limit_ms=60_000)
    answer = gpus.run(gpus.client.call(api.DEVICES, request, timeout_s=150))
    return {each.name: each for each in answer.devices}


def test_each_gpu_that_cannot_be_initialised_names_itself_with_the_drivers_words(
    found: dict[str, api.FoundDevice],
) -> None:
    assert set(found) == {"h100", "a6000"}
    for name, device in found.items():
        others = [each.address for each in found.values() if each.name != name]
        assert device.driver == "nvidia"
        assert device.problem == f"GPU {device.address} cannot be initialised: Input/output error"
        assert any(f"GPU {device.address}: RmInitAdapter failed!" in line for line in device.words)
        assert not [line for line in device.words if any(other in line for other in others)]


def test_the_driver_has_them_all_the_same_and_the_nodes_are_as_it_numbers_them(
    gpus: AgentVM, found: dict[str, api.FoundDevice]
) -> None:
    what = agentvm.privileged("/guest/usr/bin/busybox", "sh", "-c", STATE)
    status, out, err = gpus.run(gpus.once("state", what))
    assert status == 0, err
    state = out.decode()
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA RTX A6000"):
        assert f"Model: \t\t {name}" in state
    assert "ModifyDeviceFiles: 0" in state
    assert "No firmware image found" not in state
    assert "Direct firmware load" not in state
    modules = {line.split()[0] for line in state.splitlines() if line.startswith("nvidia")}
    assert {"nvidia", "nvidia_uvm", "nvidia_modeset"} <= modules
    devices = (line.split() for line in state.splitlines() if line.strip()[:3].isdigit())
    majors = {name: number for number, name, *_ in devices}
    uvm, caps = majors["nvidia-uvm"], majors["nvidia-caps"]
    nodes = dict(line.removeprefix("node ").split(": ") for line in state.splitlines() if line[:5] == "node ")
    assert nodes == {
        "nvidiactl": "195 255 666",
        "nvidia-modeset": "195 254 666",
        "nvidia0": "195 0 666",
        "nvidia1": "195 1 666",
        "nvidia-uvm": f"{uvm} 0 666",
        "nvidia-uvm-tools": f"{uvm} 1 666",
        "nvidia-caps/nvidia-cap1": f"{caps} 1 400",
        "nvidia-caps/nvidia-cap2": f"{caps} 2 444",
    }
