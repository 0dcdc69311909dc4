"""A pod under a real KVM: on newest containerd, libvirt and QEMU, over vsock, with cgroups v2 only."""

from typing import Any

INSIDE = "one_pod"


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
