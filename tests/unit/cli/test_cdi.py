"""`casemate cdi`: files that clients read, what is not in them, what of them does not hold any more."""

import json
from pathlib import Path

import pytest

from cli import binding, cdi
from tests.unit.cli.conftest import Casemate
from tests.unit.vfio.kernels import Kernel
from tests.unit.vfio.machines import MACHINES
from vfio.address import PciAddress
from vfio.binding import Bus

CARD, SOUND, DISK, NETWORK = (PciAddress.parse(each) for each in ("01:00.0", "01:00.1", "02:00.0", "03:00.0"))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A workstation whose card may be given away."""
    tree = MACHINES["workstation"](tmp_path / "desk")
    tree.nodes[CARD].write("boot_vga", "0\n")
    for module in (binding, cdi):
        monkeypatch.setattr(module, "_SYSFS", str(tree.sys))
        monkeypatch.setattr(module, "_PROC", str(tree.proc))
    monkeypatch.setattr(cdi, "_DEV", str(tmp_path / "dev"))
    kernel = Kernel(tree)
    defaults = Bus.__init__.__kwdefaults__ or {}
    monkeypatch.setattr(Bus.__init__, "__kwdefaults__", defaults | {"write": kernel.write})
    return kernel


@pytest.fixture
def etc(host: Path) -> Path:
    """The directory that the configuration names."""
    directory = host / "cdi"
    (host / "etc/config.toml").write_text(f'[vfio]\ncdi_dir = "{directory}"\ncdi_kind = "nvidia.com/pgpu"\n')
    return directory


def test_generated_by_the_configuration_and_listed(casemate: Casemate, kernel: Kernel, etc: Path) -> None:
    casemate("gpu", "bind", "01:00.0")
    result = casemate("cdi", "generate")
    path = etc / "casemate-nvidia.com-pgpu.json"
    assert result.stdout == f"{path}: 1 of 1 devices of kind nvidia.com/pgpu\n"
    assert result.stderr == "5 devices of the host are of another kind\n"
    group = kernel.at(CARD, "iommu_group").readlink().name
    assert json.loads(path.read_text()) == {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/pgpu",
        "devices": [
            {
                "name": name,
                "containerEdits": {"deviceNodes": [{"path": f"/dev/vfio/{group}", "permissions": "rw"}]},
            }
            for name in ("0", "0000:01:00.0", "all")
        ],
    }
    rows = [line.split() for line in casemate("cdi", "list").stdout.splitlines()]
    assert rows == [
        ["NAME", "ADDRESS", "NODES", "STATE"],
        ["nvidia.com/pgpu=0", "0000:01:00.0", f"/dev/vfio/{group}", "ready"],
        ["nvidia.com/pgpu=0000:01:00.0", "0000:01:00.0", f"/dev/vfio/{group}", "ready"],
        ["nvidia.com/pgpu=all", "-", f"/dev/vfio/{group}", "ready"],
    ]


def test_printed_with_what_is_left_out_beside_it(casemate: Casemate, kernel: Kernel, etc: Path) -> None:
    casemate("gpu", "bind", "03:00.0")
    result = casemate("cdi", "generate", "--stdout", "--kind", "example.org/device")
    assert result.exit_code == 0
    assert [each["name"] for each in json.loads(result.stdout)["devices"]] == ["4", str(NETWORK), "all"]
    assert f"{CARD} is not in it: bound to nvidia: casemate gpu bind {CARD}" in result.stderr
    assert f"{DISK} is not in it: bound to nvme" in result.stderr
    assert not etc.exists()
    answer = json.loads(casemate("cdi", "generate", "--stdout", "--json", "--kind", "example.org/nic").stdout)
    assert (answer["path"], answer["left"], answer["others"]) == (None, {}, 5)


def test_without_a_device_the_old_file_goes(casemate: Casemate, kernel: Kernel, etc: Path) -> None:
    casemate("gpu", "bind", "01:00.0")
    casemate("cdi", "generate")
    casemate("gpu", "unbind", "01:00.0")
    stale = casemate("cdi", "list")
    assert stale.exit_code == 1
    assert stale.stdout.count("stale: bound to nvidia: casemate gpu bind 0000:01:00.0") == 2
    printed = casemate("cdi", "generate", "--stdout")
    assert (printed.exit_code, printed.stdout, len(list(etc.iterdir()))) == (1, "", 1)
    result = casemate("cdi", "generate")
    assert result.exit_code == 1
    assert "casemate-nvidia.com-pgpu.json is removed" in result.stderr
    assert "no device of kind nvidia.com/pgpu can be listed" in result.stderr
    assert list(etc.iterdir()) == []
    assert "has no file of casemate's" in casemate("cdi", "list").stderr


def test_a_device_that_is_gone_is_stale(casemate: Casemate, kernel: Kernel, etc: Path) -> None:
    casemate("gpu", "bind", "01:00.0")
    casemate("cdi", "generate")
    for address in (CARD, SOUND):
        kernel.tree.remove(kernel.tree.nodes[address])
    listed = casemate("cdi", "list", "--json")
    assert listed.exit_code == 1
    assert {each["stale"] for each in json.loads(listed.stdout)["devices"]} == {
        "no device of this host has that name",
        "no device can be listed",
    }


def test_a_device_that_came_is_said(casemate: Casemate, kernel: Kernel, etc: Path, tmp_path: Path) -> None:
    casemate("gpu", "bind", "03:00.0")
    words = ("--output", str(tmp_path / "other"))
    casemate("cdi", "generate", "--kind", "example.org/device", *words)
    casemate("gpu", "bind", "02:00.0")
    result = casemate("cdi", "list", *words)
    assert result.exit_code == 1  # all of them are two now
    assert (
        f"example.org/device={DISK} is not in {tmp_path}/other/casemate-example.org-device.json"
        in result.stderr
    )


def test_another_file_of_the_same_kind_is_said(casemate: Casemate, kernel: Kernel, etc: Path) -> None:
    casemate("gpu", "bind", "01:00.0")
    etc.mkdir()
    (etc / "nvidia.yaml").write_text("kind: nvidia.com/pgpu\n")
    assert f"{etc}/nvidia.yaml has devices of kind nvidia.com/pgpu, too" in casemate("cdi", "generate").stderr


def test_a_kind_that_is_none_is_refused(casemate: Casemate, kernel: Kernel, etc: Path, host: Path) -> None:
    result = casemate("cdi", "generate", "--kind", "gpu")
    assert result.exit_code == 1
    assert "'gpu' is not a kind of CDI" in result.stderr
    (host / "etc/config.toml").write_text('[vfio]\ncdi_kind = "gpu"\n')
    assert "vfio.cdi_kind" in casemate("config", "check").stderr
