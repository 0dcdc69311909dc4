"""A pod under a real KVM: on newest containerd, libvirt and QEMU, over vsock, with cgroups v2 only."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.testbed import machine
from tests.testbed.installation import PLACE

LIMIT_S = 900.0


@pytest.fixture(scope="module")
def seen(bed: machine.Bed, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What inside/one_pod.py saw in an instance of its own."""
    share = tmp_path_factory.mktemp("share")
    command = ["/usr/bin/python3", "-BEs", "-m", "tests.testbed.inside.one_pod"]
    shape = machine.Shape(share=share, limit_s=LIMIT_S)
    assert machine.run(bed, ["env", "--chdir", PLACE, *command], shape) == 0
    return json.loads(Path(share, "seen.json").read_text())


def test_a_container_ends_with_its_programs_exit_code(seen: Any) -> None:
    assert (seen["first"]["code"], seen["first"]["err"]) == (0, "")
    assert seen["facts"]["code"] == 7, seen["facts"]


def test_it_has_a_kernel_of_its_own(seen: Any) -> None:
    kernel, first_process = seen["facts"]["out"].split()
    assert kernel != seen["kernel"]
    assert first_process == "sh"


def test_its_machine_runs_on_kvm_and_is_spoken_to_over_vsock(seen: Any) -> None:
    assert seen["said"] == "up\n"
    (pod,) = seen["pods"]
    assert (pod["id"], pod["state"]) == ("third", "running")
    assert (pod["accel"], pod["transport"]) == ("kvm", "vsock")


def test_killed_it_leaves_nothing_behind(seen: Any) -> None:
    assert seen["killed"] == 128 + 9
    assert seen["left"] == []
