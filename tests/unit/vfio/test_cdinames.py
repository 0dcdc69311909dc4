"""What names of CDI stand for, by anybody's files: NVIDIA's YAML, ours, broken ones."""

import json
from pathlib import Path

import pytest

from rpc.errors import FailedPrecondition
from vfio import cdinames
from vfio.cdinames import Names

# As NVIDIA's sandbox device plugin has the CDI library write it, where the host has no IOMMUFD.
NVIDIAS = """\
---
cdiVersion: 0.5.0
kind: nvidia.com/pgpu
devices:
    - name: "29"
      containerEdits:
        deviceNodes:
            - path: /dev/vfio/vfio
            - path: /dev/vfio/29
    - name: "30"
      containerEdits:
        deviceNodes:
            - path: /dev/vfio/vfio
            - path: /dev/vfio/30
containerEdits: {}
"""


def spec(kind: str = "example.org/gpu", **devices: list[dict[str, str]]) -> str:
    listed = [{"name": name, "containerEdits": {"deviceNodes": nodes}} for name, nodes in devices.items()]
    return json.dumps({"cdiVersion": "0.5.0", "kind": kind, "devices": listed})


def put(directory: Path, name: str, text: str) -> str:
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(text)
    return str(directory)


def nodes(names: Names, name: str) -> tuple[str, ...]:
    found = names.get(name)
    assert found is not None
    return found.nodes


def test_a_name_is_found_in_yaml_and_in_json(tmp_path: Path) -> None:
    directory = put(tmp_path, "nvidia.yaml", NVIDIAS)
    put(tmp_path, "ours.json", spec(first=[{"path": "/dev/vfio/7"}]))
    names = Names([directory, str(tmp_path / "none")])
    assert nodes(names, "nvidia.com/pgpu=29") == ("/dev/vfio/vfio", "/dev/vfio/29")
    assert nodes(names, "example.org/gpu=first") == ("/dev/vfio/7",)
    assert names.get("example.org/gpu=29") is None
    assert names.left_out == {}


def test_a_nodes_place_on_the_host_counts_and_what_all_devices_have_too(tmp_path: Path) -> None:
    text = json.loads(spec(one=[{"path": "/dev/gpu", "hostPath": "/dev/vfio/7"}]))
    text["containerEdits"] = {"deviceNodes": [{"path": "/dev/vfio/vfio"}]}
    names = Names([put(tmp_path, "a.json", json.dumps(text))])
    assert nodes(names, "example.org/gpu=one") == ("/dev/vfio/vfio", "/dev/vfio/7")


def test_the_last_directory_counts_and_two_files_of_one_are_unclear(tmp_path: Path) -> None:
    first = put(
        tmp_path / "etc", "a.json", spec(one=[{"path": "/dev/vfio/1"}], two=[{"path": "/dev/vfio/2"}])
    )
    second = put(tmp_path / "run", "b.yaml", spec(one=[{"path": "/dev/vfio/11"}]))
    put(tmp_path / "run", "c.json", spec(three=[]))
    names = Names([first, second])
    assert nodes(names, "example.org/gpu=one") == ("/dev/vfio/11",)
    assert nodes(names, "example.org/gpu=two") == ("/dev/vfio/2",)
    put(tmp_path / "run", "d.json", spec(one=[{"path": "/dev/vfio/12"}]))
    with pytest.raises(
        FailedPrecondition, match=r"example.org/gpu=one is in several files: .*b\.yaml, .*d\.json"
    ):
        Names([first, second]).get("example.org/gpu=one")


BROKEN = {
    "text.json": "{",
    "list.json": "[]",
    "kindless.json": '{"devices": []}',
    "numbered.json": '{"kind": "a.b/c", "devices": [{"name": 7}]}',
    "flat.json": '{"kind": "a.b/c", "devices": 7}',
    "nodes.json": spec(one=[{"path": ""}]),
    "twice.json": '{"kind": "a.b/c", "devices": [{"name": "one"}, {"name": "one"}]}',
    "deep.json": "[" * 100_000,
    "tabs.yaml": "kind:\n\t- a",
    "object.yaml": "!!python/object/apply:os.system ['true']",
    "deep.yaml": "[" * 5000,
    "binary.yaml": "\0\1\2",
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_of_what_is_no_such_file_no_name_is_known_and_the_others_are(tmp_path: Path, name: str) -> None:
    directory = put(tmp_path, name, BROKEN[name])
    put(tmp_path, "good.json", spec("good.org/gpu", one=[{"path": "/dev/vfio/7"}]))
    names = Names([directory])
    assert nodes(names, "good.org/gpu=one") == ("/dev/vfio/7",)
    assert list(names.left_out) == [f"{tmp_path}/{name}"]
    assert names.left_out[f"{tmp_path}/{name}"]


def test_what_is_too_large_or_too_much_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cdinames, "MOST_BYTES", 1 << 20)
    monkeypatch.setattr(cdinames, "MOST_FILES", 2)
    directory = put(tmp_path, "a.json", spec(one=[]) + " " * (1 << 20))
    for name in "bc":
        put(tmp_path, f"{name}.json", spec("example.org/gpu", **{name: []}))
    put(tmp_path, "read.me", "no file of CDI")
    names = Names([directory])
    assert names.left_out == {
        f"{directory}/a.json": "it is larger than 1 MiB",
        f"{directory}/c.json": "it is beyond 2 files",
    }
    assert names.get("example.org/gpu=b") is not None
