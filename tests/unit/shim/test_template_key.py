"""A template's key changes with what a guest could see of what it was booted on, and with nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from config.settings import Profile
from shim.paths import PodPaths
from shim.vm import template_key as module
from shim.vm.accel import Acceleration
from shim.vm.backing import STRICT, Backing, Cell
from shim.vm.passthrough import Function
from shim.vm.setting import Setting
from shim.vm.template_key import cpu_of, parts, template_key
from tests.unit.shim.test_sources import setting_of

MIB = 1 << 20
CPUINFO = """\
processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 143
model name\t: Some CPU
stepping\t: 8
microcode\t: 0x2b
cpu MHz\t\t: 2100.123
apicid\t\t: 0
flags\t\t: fpu sse sse2
bugs\t\t: spectre

processor\t: 1
vendor_id\t: Other
"""


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """One whose QEMU and firmware are files."""
    for name in ("qemu", "firmware"):
        (tmp_path / name).write_text(name)
    found = setting_of(tmp_path)
    return replace(found, qemu=str(tmp_path / "qemu"), firmware=str(tmp_path / "firmware"))


def shaped(**changes: object) -> Callable[[Setting], Setting]:
    def change(setting: Setting) -> Setting:
        profile: Profile = setting.request.profile.replace(**changes)
        return replace(setting, request=replace(setting.request, profile=profile))

    return change


def asked(**changes: object) -> Callable[[Setting], Setting]:
    return lambda setting: replace(setting, request=replace(setting.request, **changes))  # type: ignore[arg-type]


def other_image(**changes: object) -> Callable[[Setting], Setting]:
    return lambda setting: replace(setting, image=replace(setting.image, **changes))  # type: ignore[arg-type]


OTHERS = {
    "image": other_image(digest="sha256:def"),
    "image's command line": other_image(cmdline="loud"),
    "image's place": other_image(rootfs=Path("/elsewhere/rootfs")),
    "memory": shaped(memory_bytes=512 * MIB),
    "vcpus": shaped(vcpus=3),
    "command line": shaped(kernel_cmdline="nokaslr"),
    "cpu model": shaped(cpu_model="qemu64"),
    "accelerator": lambda setting: replace(setting, accel=Acceleration("kvm", "a test")),
    "transport": lambda setting: replace(setting, transport="vsock"),
    "tenant": asked(tenant="blue"),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS.keys())
def test_another_machine_has_another_key(setting: Setting, change: Callable[[Setting], Setting]) -> None:
    assert template_key(change(setting)) != template_key(setting)


@pytest.mark.parametrize("name", ["qemu", "firmware"])
def test_a_program_that_was_replaced_changes_the_key(setting: Setting, tmp_path: Path, name: str) -> None:
    before = template_key(setting)
    assert template_key(setting) == before
    (tmp_path / "new").write_text(name)
    (tmp_path / "new").replace(tmp_path / name)
    after = template_key(setting)
    assert after != before
    os.utime(tmp_path / name, (1, 1))
    assert template_key(setting) not in (before, after)


def test_another_cpu_or_kernel_changes_the_key(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    before = template_key(setting)
    with monkeypatch.context() as patch:
        patch.setattr(module, "cpu_of", lambda _: "another")
        assert template_key(setting) != before
    with monkeypatch.context() as patch:
        known = os.uname()
        patch.setattr(os, "uname", lambda: os.uname_result((*known[:2], "99.1", *known[3:])))
        assert template_key(setting) != before
    assert template_key(setting) == before


def test_which_pod_asks_does_not_matter(setting: Setting, tmp_path: Path) -> None:
    before = template_key(setting)
    other = replace(
        setting.request,
        pod_id="other",
        hostname="other",
        paths=PodPaths("elsewhere", "other", tmp_path / "other"),
        cache=tmp_path / "other-cache",
        profile=setting.request.profile.replace(name="another", template="tenant"),
    )
    asking = replace(
        setting,
        request=other,
        ram=tmp_path / "other-ram",
        image=replace(setting.image, name="another"),
        accel=Acceleration(setting.accel.kind, "another reason"),
    )
    assert asking.places != setting.places
    assert template_key(asking) == before


GPU = Function(
    "0000:3b:00.0", "an H100", "gpu", 12, "vfio0", 0, 0, bar_bytes=128 << 30, vendor=0x10DE, node=1
)
CELL = Cell(1, 128 * MIB, STRICT, (4, 5))


HUGE = Backing(2 << 20, cells=(CELL,))


def with_devices(setting: Setting, *functions: Function, backing: Backing = HUGE) -> Setting:
    return replace(setting, request=replace(setting.request, functions=functions, backing=backing))


def test_which_devices_of_one_shape_does_not_matter(setting: Setting) -> None:
    """Nor which pages and whose memory a pod has: of these a template has none."""
    before = template_key(with_devices(setting, GPU))
    other = replace(GPU, address="0001:9f:00.0", title="another", group=3, cdev=None, node=0, path="/dev/x")
    alike = (
        with_devices(setting, other),
        with_devices(setting, GPU, backing=Backing(0, "none are free", (replace(CELL, policy="", cpus=()),))),
        with_devices(setting, GPU, backing=Backing(1 << 30, cells=(replace(CELL, host=0),))),
    )
    assert {template_key(each) for each in alike} == {before}


def test_room_for_other_devices_is_another_machine(setting: Setting) -> None:
    shapes = (
        setting,
        with_devices(setting, GPU),
        with_devices(setting, GPU, replace(GPU, address="0000:3c:00.0", port=1)),
        with_devices(setting, replace(GPU, bar_bytes=256 << 30)),
        with_devices(setting, GPU, backing=Backing()),
    )
    assert len({template_key(each) for each in shapes}) == len(shapes)


def test_of_the_cpu_what_a_guest_can_see_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO)
    assert cpu_of(file) == "GenuineIntel 6 143 Some CPU 8 0x2b fpu sse sse2"
    file.write_text(CPUINFO.replace("2100.123", "800.000").replace("Other", "Third"))
    assert cpu_of(file) == "GenuineIntel 6 143 Some CPU 8 0x2b fpu sse sse2"


def test_this_hosts_cpu_can_be_told(setting: Setting) -> None:
    assert len(cpu_of(Path("/proc/cpuinfo")).split()) > 10
    assert set(parts(setting)) == {"image", "domain", "qemu", "firmware", "host", "tenant"}
