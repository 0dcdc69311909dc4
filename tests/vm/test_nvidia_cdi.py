"""What our specification for containers with NVIDIA's GPUs says, beside what NVIDIA's container toolkit says.

Both look at the same directory: Debian's packages of the driver as a guest image has them, and nodes as the
driver has them made. Each difference that is not a defect has its reason here.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent import nvidiacdi
from tests.vm import builds, drivertree
from tests.vm.drivertree import GPUS

# Of graphics, which a guest has not: the cloud kernel has no DRM.
GRAPHICS = {("../libnvidia-allocator.so.1", f"{nvidiacdi.LIBRARIES}/gbm/nvidia-drm_gbm.so")}
OUR_HOOK_DOES = {"create-symlinks", "enable-cuda-compat", "update-ldcache"}
# The driver is loaded with NVreg_ModifyDeviceFiles=0, which is what this hook pretends to the container.
BY_THE_DRIVER = {"disable-device-node-modification"}
# Which GPUs EGL and Vulkan show; limits of memory, which the operator of the toolkit has to ask for.
NOT_OURS = {"update-application-profile", "apply-cuda-memory-limits"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drivertree.make(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="module")
def ours(root: Path) -> Any:
    return nvidiacdi.specification(range(GPUS), str(root))


@pytest.fixture(scope="module")
def theirs(root: Path) -> Any:
    try:
        program = builds.nvcdi()
    except builds.NotHereError as reason:
        pytest.skip(str(reason))
    version = nvidiacdi.driver_version(str(root))
    done = subprocess.run([program, root, version, str(GPUS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.replace(f"{root}/", "/"))


def test_it_is_valid(ours: Any) -> None:
    done = subprocess.run(
        [builds.cdicheck()], input=json.dumps(ours), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def nodes(edits: Any) -> dict[str, tuple[int, int, int, str]]:
    return {
        each["path"]: (each["major"], each.get("minor", 0), each["fileMode"], each["permissions"])
        for each in edits["deviceNodes"]
    }


def mounts(spec: Any) -> dict[str, tuple[str, list[str]]]:
    found = spec["containerEdits"]["mounts"]
    return {each["containerPath"]: (each["hostPath"], each["options"]) for each in found}


def words(spec: Any, flag: str) -> list[str]:
    """What hooks are told by a flag, as --flag=word or as two words."""
    lines = [each["args"] for each in spec["containerEdits"]["hooks"]]
    joined = [word.removeprefix(f"{flag}=") for line in lines for word in line if word.startswith(f"{flag}=")]
    return joined + [line[at + 1] for line in lines for at, word in enumerate(line[:-1]) if word == flag]


def test_the_same_devices_with_the_same_nodes(ours: Any, theirs: Any) -> None:
    assert ours["kind"] == theirs["kind"]
    devices = [
        {each["name"]: nodes(each["containerEdits"]) for each in spec["devices"]} for spec in (ours, theirs)
    ]
    assert devices[0] == devices[1]
    assert set(devices[0]) == {"0", "1", "all"}
    assert nodes(ours["containerEdits"]) == nodes(theirs["containerEdits"])


def test_the_same_libraries_programs_and_firmware(ours: Any, theirs: Any) -> None:
    assert mounts(ours) == mounts(theirs)
    names = {Path(path).name.partition(".so")[0] for path in mounts(ours)}
    assert {"libcuda", "libnvidia-ml", "libnvidia-ptxjitcompiler", "nvidia-smi", "gsp_ga10x.bin"} <= names


def test_the_same_environment(ours: Any, theirs: Any) -> None:
    assert sorted(ours["containerEdits"]["env"]) == sorted(theirs["containerEdits"]["env"])


def test_the_same_links_but_those_of_graphics(ours: Any, theirs: Any) -> None:
    ourselves, others = (
        {tuple(word.split("::")) for word in words(spec, "--link")} for spec in (ours, theirs)
    )
    assert others - ourselves == GRAPHICS
    assert ourselves <= others


def test_the_same_folders_for_the_loader_and_the_drivers_version(ours: Any, theirs: Any) -> None:
    assert words(ours, "--folder") == words(theirs, "--folder")
    assert words(ours, "--driver") == words(theirs, "--host-driver-version")


def test_every_hook_of_theirs_is_ours_or_has_its_reason(ours: Any, theirs: Any) -> None:
    edits = [theirs["containerEdits"], *(each["containerEdits"] for each in theirs["devices"])]
    found = {hook["args"][1] for each in edits for hook in each.get("hooks") or ()}
    assert found == OUR_HOOK_DOES | BY_THE_DRIVER | NOT_OURS
    assert len(ours["containerEdits"]["hooks"]) == 1
