"""A file of the Container Device Interface: as its specification has it, with what pods may have, by name."""

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rpc.errors import FailedPrecondition, InvalidArgument
from shim import oci
from shim.devicewishes import wishes_of
from tests.unit.vfio.cdihosts import (
    AMDS,
    ANY,
    FIRST,
    NETWORK,
    PGPU,
    SECOND,
    SOUND,
    bound,
    group,
    listed,
    small,
)
from tests.unit.vfio.claimers import myself
from tests.unit.vfio.hosts import OTHER, at
from tests.unit.vfio.kernels import Kernel
from tests.unit.vfio.trees import Model, Tree
from vfio import cdi, inventory
from vfio.address import PciAddress
from vfio.binding import Bus
from vfio.ledger.demand import Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.offer import offer


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return small(tmp_path / "host")


@pytest.fixture
def kernel(tree: Tree) -> Kernel:
    return Kernel(tree)


@pytest.fixture
def ledger(in_memory: Path) -> Iterator[Ledger]:
    with Ledger(in_memory / "ledger") as ledger:
        yield ledger


# --- as the specification has it (0.5.0: SPEC.md, schema/schema.json, schema/defs.json, pkg/parser) ---


def check_valid(spec: Any) -> None:
    """What a file must be, in our words: the keys that there are, those that must be, names and paths."""
    assert set(spec) <= {"cdiVersion", "kind", "annotations", "devices", "containerEdits"}
    assert {"cdiVersion", "kind", "devices"} <= set(spec)
    version = tuple(map(int, re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", spec["cdiVersion"]).groups()))  # type: ignore[union-attr]
    assert (0, 3, 0) <= version <= (1, 0, 0)
    vendor, slash, name = spec["kind"].partition("/")
    assert slash
    for word in (vendor, name):
        assert re.fullmatch(r"[A-Za-z]([\w.-]*[A-Za-z0-9])?", word, re.ASCII)
    assert "." not in name or version >= (0, 6, 0)
    assert spec["devices"], "a file has at least one device"
    names = [device["name"] for device in spec["devices"]]
    assert len(set(names)) == len(names)
    for device in spec["devices"]:
        assert set(device) == {"name", "containerEdits"}
        assert re.fullmatch(r"[A-Za-z0-9]([\w.:-]*[A-Za-z0-9])?", device["name"], re.ASCII)
        assert device["name"][0].isalpha() or version >= (0, 5, 0)
        assert set(device["containerEdits"]) == {"deviceNodes"}, "edits of a device are not empty"
        assert device["containerEdits"]["deviceNodes"]
        for node in device["containerEdits"]["deviceNodes"]:
            assert set(node) <= {
                "path",
                "hostPath",
                "type",
                "major",
                "minor",
                "fileMode",
                "permissions",
                "uid",
                "gid",
            }
            assert node["path"].startswith("/dev/vfio/")
            assert set(node["permissions"]) <= set("rwm")


@pytest.mark.parametrize("kind", [PGPU, ANY, "amd.com/gpu", "example.org/a.b"])
def test_valid_by_the_specification(kernel: Kernel, kind: str) -> None:
    bound(kernel, FIRST, SOUND, SECOND, AMDS, NETWORK)
    spec = cdi.spec(listed(kernel, kind))
    check_valid(json.loads(json.dumps(spec)))
    assert spec["kind"] == kind


def test_by_index_by_address_and_all(kernel: Kernel) -> None:
    bound(kernel, FIRST, SOUND, SECOND)
    devices = listed(kernel, PGPU).devices
    one, two = group(kernel, FIRST), group(kernel, SECOND)
    assert devices == {"0": (one,), str(FIRST): (one,), "1": (two,), str(SECOND): (two,), "all": (one, two)}


def test_an_index_counts_cards_whoever_has_them(kernel: Kernel) -> None:
    bound(kernel, SECOND)
    found = listed(kernel, PGPU)
    assert list(found.devices) == ["1", str(SECOND), "all"]
    assert found.left == {FIRST: f"bound to nvidia: casemate gpu bind {FIRST}"}
    every = listed(kernel, ANY)
    assert [every.names[each] for each in ("0", "1", "2", "3")] == [FIRST, SECOND, AMDS, NETWORK]
    assert every.names[str(SOUND)] == SOUND  # a function of a card: by its address only
    assert "4" not in every.names


def test_a_kind_has_its_vendors_and_classes_devices(kernel: Kernel) -> None:
    assert set(listed(kernel, PGPU).left) == {FIRST, SECOND}
    assert set(listed(kernel, "amd.com/pgpu").left) == {AMDS}
    assert set(listed(kernel, "example.org/nic").left) == {NETWORK}
    every = listed(kernel, ANY)
    assert set(every.left) == {FIRST, SOUND, SECOND, AMDS, NETWORK}
    assert (every.others, listed(kernel, PGPU).others) == (0, 3)


@pytest.mark.parametrize(
    "kind", ["", "gpu", "nvidia.com/", "/gpu", "nvidia.com/gpu=0", "a/b/c", "1a/b", "a/b\n"]
)
def test_what_is_no_kind_is_refused(kernel: Kernel, kind: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a kind of CDI"):
        listed(kernel, kind)


def test_vfs_have_their_addresses_only(kernel: Kernel) -> None:
    tree = kernel.tree
    physical = tree.nodes[NETWORK]
    (vf,) = tree.vfs(physical, Model("8086:1520", 0x020000, driver="igbvf", resets="flr"), 1, 7)
    kernel.native[vf.address] = "igbvf"
    bound(kernel, vf.address)
    found = listed(kernel, "example.org/nic")
    assert list(found.devices) == [str(vf.address), "all"]
    assert found.left[NETWORK] == "refused: vfs-enabled"


# --- what a container gets ---


def read_by_shim(kernel: Kernel, spec: dict[str, Any], name: str, tmp_path: Path) -> list[set[PciAddress]]:
    """config.json as a client makes it of that name, numbers as the kernel gives them, read by the shim."""
    (device,) = [each for each in spec["devices"] if each["name"] == name]
    links = tmp_path / f"sysfs-{name}" / "dev/char"
    links.mkdir(parents=True)
    nodes = []
    for minor, node in enumerate(device["containerEdits"]["deviceNodes"]):
        path = node["path"]
        target = f"../../devices/virtual/vfio/{path.rpartition('/')[2]}"
        if path.startswith("/dev/vfio/devices/"):
            (owner,) = kernel.tree.sys.glob(f"bus/pci/devices/*/vfio-dev/{path.rpartition('/')[2]}")
            target = str(owner.resolve())
        (links / f"511:{minor}").symlink_to(target)
        nodes.append({"path": path, "type": "c", "major": 511, "minor": minor})
    wishes = wishes_of(oci.parse({"linux": {"devices": nodes}}), str(links.parents[1]))
    found = inventory.read(str(kernel.tree.sys))
    return [
        {at(node.address)} if node.group is None else {*found.groups[node.group]} for node in wishes.nodes
    ]


@pytest.mark.parametrize("iommufd", [False, True])
def test_the_shim_reads_that_device(kernel: Kernel, tmp_path: Path, iommufd: bool) -> None:
    bound(kernel, FIRST, SOUND, SECOND)
    dev = tmp_path / "dev"
    (dev / "vfio/devices").mkdir(parents=True)
    if iommufd:
        (dev / "iommu").touch()
        for number in (1, 2, 3):
            (dev / f"vfio/devices/vfio{number}").touch()
    spec = cdi.spec(listed(kernel, PGPU, dev=str(dev)))
    check_valid(spec)
    form = "/dev/vfio/devices/vfio" if iommufd else "/dev/vfio/"
    paths = [node["path"] for device in spec["devices"] for node in device["containerEdits"]["deviceNodes"]]
    assert all(re.fullmatch(rf"{form}\d+", path) for path in paths)
    assert read_by_shim(kernel, spec, str(SECOND), tmp_path) == [{SECOND}]
    assert read_by_shim(kernel, spec, "1", tmp_path) == [{SECOND}]
    assert set().union(*read_by_shim(kernel, spec, "0", tmp_path)) == {FIRST, SOUND}
    assert set().union(*read_by_shim(kernel, spec, "all", tmp_path)) == {FIRST, SOUND, SECOND}


# --- what is left out, with the reason ---


def test_what_goes_with_it_has_to_be_bound_too(kernel: Kernel) -> None:
    bound(kernel, FIRST)
    why = listed(kernel, PGPU).left[FIRST]
    assert why == f"{SOUND}, which goes with it, is bound to snd_hda_intel: casemate gpu bind {FIRST}"


def test_what_no_pod_may_have_is_left_out(kernel: Kernel) -> None:
    bound(kernel, SECOND)
    kernel.at(SECOND, "reset_method").write_text("\n")
    assert listed(kernel, PGPU).left[SECOND] == "refused: no-reset"
    kernel.at(SECOND, "reset_method").write_text("flr\n")
    kernel.tree.process(77, "qemu", group(kernel, SECOND))
    assert listed(kernel, PGPU).left[SECOND] == "refused: open-handles"


def test_what_the_host_uses_is_not_said_to_be_bound(kernel: Kernel) -> None:
    kernel.tree.interface("eth0", kernel.tree.nodes[NETWORK].directory)
    kernel.tree.default_route("eth0")
    assert listed(kernel, ANY).left[NETWORK] == "refused: default-route"


def test_a_pods_device_stays_if_it_was_bound_ahead(kernel: Kernel, ledger: Ledger) -> None:
    """And its opening by that pod's machine says nothing of the next one."""
    bound(kernel, SECOND)
    sys = str(kernel.tree.sys)
    host = offer(inventory.read(sys), sys=sys)
    claim = ledger.claim(OTHER, myself(), Wanted((Request.at(FIRST, SECOND),)), host)
    Bus(sys, write=kernel.write).bind(ledger, claim.id, claim.addresses)
    ledger.use(claim.id)
    for pid, address in ((77, FIRST), (78, SECOND)):
        kernel.tree.process(pid, "qemu", group(kernel, address))
    found = listed(kernel, PGPU, ledger)
    assert list(found.entries) == [SECOND]
    assert found.left == {FIRST: f"bound to vfio-pci for pod {OTHER} only"}


def test_what_is_quarantined_is_left_out(kernel: Kernel, ledger: Ledger) -> None:
    bound(kernel, SECOND)
    ledger.quarantine(SECOND, "fell off the bus")
    assert listed(kernel, PGPU, ledger).left[SECOND] == "quarantined: fell off the bus"


def test_no_file_without_a_device(kernel: Kernel) -> None:
    with pytest.raises(FailedPrecondition, match=r"no device of kind nvidia\.com/pgpu") as raised:
        cdi.spec(listed(kernel, PGPU))
    assert f"{FIRST}: bound to nvidia" in str(raised.value.details)


# --- the file ---


def test_written_wholly_for_everybody_to_read(tmp_path: Path) -> None:
    directory = tmp_path / "etc/cdi"
    path = directory / "casemate-nvidia.com-pgpu.json"
    for text in ("one\n", "two\n"):
        assert cdi.write(str(directory), cdi.file_name(PGPU), text) == str(path)
        assert path.read_text() == text
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [each.name for each in directory.iterdir()] == [path.name]


def test_what_cannot_be_written_leaves_what_was(tmp_path: Path) -> None:
    cdi.write(str(tmp_path), "casemate-a-b.json", "one\n")
    with pytest.raises(UnicodeEncodeError):
        cdi.write(str(tmp_path), "casemate-a-b.json", "tw\N{LATIN SMALL LETTER O WITH STROKE}\n")
    assert [each.name for each in tmp_path.iterdir()] == ["casemate-a-b.json"]
    assert (tmp_path / "casemate-a-b.json").read_text() == "one\n"
    with pytest.raises(FailedPrecondition, match="cannot be written"):
        cdi.write(str(tmp_path / "casemate-a-b.json"), "x.json", "")


def test_read_as_it_was_written_and_nothing_else(kernel: Kernel, tmp_path: Path) -> None:
    bound(kernel, SECOND)
    found = listed(kernel, PGPU)
    path = cdi.write(str(tmp_path), cdi.file_name(PGPU), json.dumps(cdi.spec(found)))
    assert cdi.read(path) == (PGPU, found.devices)
    for text in ("", "[]", "{}", '{"kind": "a/b", "devices": [{"name": "0"}]}'):
        Path(path).write_text(text)
        with pytest.raises(FailedPrecondition, match="is not what casemate cdi generate writes"):
            cdi.read(path)


def test_stale_is_what_could_not_be_listed_now(kernel: Kernel) -> None:
    bound(kernel, FIRST, SOUND, SECOND)
    before = listed(kernel, PGPU).devices
    assert set(cdi.stale(listed(kernel, PGPU), before).values()) == {""}
    kernel.tree.remove(kernel.tree.nodes[FIRST])
    kernel.tree.remove(kernel.tree.nodes[SOUND])
    wrong = cdi.stale(listed(kernel, PGPU), before)
    assert wrong[str(FIRST)] == "no device of this host has that name"
    assert wrong["0"] == f"it has {group(kernel, SECOND)} now"  # the next GPU is the first now
    assert wrong["1"] == "no device of this host has that name"
    assert wrong[str(SECOND)] == ""
    assert wrong["all"].startswith("it has ")


def test_stale_is_another_node_and_another_driver(kernel: Kernel) -> None:
    bound(kernel, SECOND)
    assert cdi.stale(listed(kernel, PGPU), {str(SECOND): ("/dev/vfio/devices/vfio9",)}) == {
        str(SECOND): f"it has {group(kernel, SECOND)} now"
    }
    wrong = cdi.stale(listed(kernel, PGPU), {str(FIRST): (group(kernel, FIRST),)})
    assert wrong[str(FIRST)].startswith("bound to nvidia")


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("nvidia.yaml", "---\ncdiVersion: 0.5.0\nkind: nvidia.com/pgpu\n", True),
        ("nvidia.json", '{\n  "cdiVersion": "0.5.0",\n  "kind": "nvidia.com/pgpu",\n', True),
        ("nvidia.yaml", "kind: nvidia.com/gpu\n", False),
        ("nvidia.txt", "kind: nvidia.com/pgpu\n", False),
        (cdi.file_name(PGPU), '"kind": "nvidia.com/pgpu"\n', False),
    ],
)
def test_other_files_of_the_same_kind_are_found(tmp_path: Path, name: str, text: str, found: bool) -> None:
    (tmp_path / name).write_text(text)
    assert bool(cdi.rivals(str(tmp_path), cdi.file_name(PGPU), PGPU)) == found
    assert cdi.rivals(str(tmp_path / "none"), name, PGPU) == []
