"""The OCI specification, read: whatever JSON comes, it is understood or refused by the name of the field."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.errors import CasemateError, InvalidArgument
from shim import oci, spec
from tests.unit.shim.pods import config


def hooked(**changes: object) -> dict[str, Any]:
    return {"hooks": {"poststop": [{"path": "/bin/x"} | changes]}}


# JSON as Python reads it: no lone surrogate is kept out, as "\ud800" is JSON too.
TEXT = st.text(st.characters(codec=None), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)

# Documents that look like a config.json, each field what it should be or anything at all.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "terminal": st.booleans(),
    "args": st.lists(TEXT, max_size=3),
    "path": st.sampled_from(["/dev/null", "/dev/sda", "", "rootfs", "/proc/1/ns/net", "/\0"]) | TEXT,
    "readonly": st.booleans(),
    "type": st.sampled_from(["bind", "tmpfs", "network", "pid", "ipc", "uts", "mount", "", "c"]) | TEXT,
    "source": st.sampled_from(["/", "/nowhere", "/dev/null", "\0", "\ud800", ""]) | TEXT,
    "destination": st.sampled_from(["/mnt", "mnt", "/", ""]) | TEXT,
    "options": st.lists(st.sampled_from(["bind", "rbind", "ro", "nosuid"]) | TEXT, max_size=3),
    "apparmorProfile": TEXT,
    "selinuxLabel": TEXT,
    "mountLabel": TEXT,
    "major": st.integers(),
    "hostname": TEXT,
}
NAMES = st.sampled_from(
    ["process", "root", "linux", "hooks", "mounts", "namespaces", "devices", "annotations", *FIELDS]
)


MOUNTS = st.fixed_dictionaries(
    {"destination": FIELDS["destination"]},
    optional={name: FIELDS[name] for name in ("type", "source", "options")},
)


@st.composite
def objects(draw: st.DrawFn, depth: int = 3) -> Any:
    result: dict[str, Any] = {}
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        kind = draw(st.integers(0, 9))
        if kind == 0:
            result[name] = draw(JSON)
        elif name in FIELDS:
            result[name] = draw(FIELDS[name])
        elif depth == 0:
            result[name] = {}
        elif name == "mounts":
            result[name] = draw(st.lists(MOUNTS, max_size=3))
        elif name in ("namespaces", "devices"):
            result[name] = draw(st.lists(objects(depth=depth - 1), max_size=3))
        else:
            result[name] = draw(objects(depth=depth - 1))
    return result


@given(JSON | objects())
def test_arbitrary_json_is_understood_or_refused(document: object) -> None:
    try:
        parsed = oci.parse(document)
    except InvalidArgument as error:
        refusal = error.brief
    else:
        assert parsed.document is document
        return
    assert refusal.startswith("OCI spec: ")


@given(objects(), st.lists(MOUNTS, max_size=3))
def test_what_parses_is_made_fit_for_a_guest_or_refused(changes: dict[str, Any], mounts: list[Any]) -> None:
    """With the namespaces that every client asks for, so that more than the first refusal is met."""
    document = config(mounts=mounts)
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(document.get(name), dict):
            document[name] = document[name] | value
        else:
            document[name] = value
    before = copy.deepcopy(document)
    try:
        guest = spec.for_guest(oci.parse(document), "web")
    except CasemateError:
        return
    finally:
        assert repr(document) == repr(before), "the host's document is not to be changed"
    shared = {f"{spec.GUEST_SHARE}/web/{entry.name}" for entry in guest.shared}
    assert {mount["source"] for mount in guest.document["mounts"] if mount["type"] == "bind"} <= shared | {
        mount.source for mount in oci.parse(document).mounts if not mount.is_bind
    }
    assert guest.document["root"]["path"] == f"{spec.GUEST_SHARE}/web/rootfs"


@pytest.mark.parametrize("depth", [400, 900])
def test_a_document_that_is_very_deep_is_understood_or_refused(depth: int) -> None:
    """As deep as Python's own JSON reader takes it."""
    deep: dict[str, Any] = {}
    for _ in range(depth):
        deep = {"x": deep}
    try:
        spec.for_guest(oci.parse(config(extension=deep)), "web")
    except CasemateError:
        return


def test_the_parts_that_matter_are_found() -> None:
    parsed = oci.parse(
        {
            "process": {"terminal": True, "args": ["sh", "-c", "true"]},
            "root": {"path": "rootfs", "readonly": True},
            "hostname": "web",
            "mounts": [
                {"destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind", "ro"]}
            ],
            "linux": {
                "namespaces": [{"type": "network", "path": "/run/netns/x"}, {"type": "pid"}],
                "devices": [
                    {"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                    {
                        "path": "/dev/b",
                        "type": "b",
                        "major": 7,
                        "minor": 0,
                        "fileMode": 0o640,
                        "uid": 1,
                        "gid": 2,
                    },
                ],
            },
            "hooks": {"prestart": [{"path": "/bin/x"}], "poststop": [], "poststart": None},
            "annotations": {"a": "b"},
        }
    )
    assert (parsed.terminal, parsed.args, parsed.hostname) == (True, ("sh", "-c", "true"), "web")
    assert (parsed.rootfs, parsed.readonly) == ("rootfs", True)
    assert parsed.mounts == (oci.Mount("/data", "bind", "/srv", ("rbind", "ro")),)
    assert parsed.namespace("network") == oci.Namespace("network", "/run/netns/x")
    assert parsed.namespace("user") is None
    assert parsed.devices == (
        oci.Device("/dev/null", "c", 1, 3, None, 0, 0),
        oci.Device("/dev/b", "b", 7, 0, 0o640, 1, 2),
    )
    assert parsed.hooks == {"prestart": (oci.Hook("/bin/x", ("/bin/x",), {}),)}
    assert parsed.annotations == {"a": "b"}


def test_null_is_the_same_as_absent() -> None:
    nulls = dict.fromkeys(("process", "root", "linux", "hooks", "mounts", "annotations", "hostname"))
    assert oci.parse(dict(nulls)).mounts == oci.parse({}).mounts == ()
    assert oci.parse({"process": {"args": None, "terminal": None}}).args == ()


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ([], "config.json is not of type dict"),
        ({"process": []}, "config.json.process is not of type dict"),
        ({"process": {"terminal": 1}}, "process.terminal is not of type bool"),
        ({"process": {"args": ["sh", 1]}}, r"process.args\[1\] is not of type str"),
        ({"root": {"path": 7}}, "root.path is not of type str"),
        ({"mounts": [{"destination": "data"}]}, "mount destination 'data' is not absolute"),
        ({"mounts": [[]]}, r"mounts\[\] is not of type dict"),
        ({"linux": {"devices": [{"major": True}]}}, r"linux.devices\[\].major is not of type int"),
        ({"linux": {"namespaces": {}}}, "linux.namespaces is not of type list"),
        ({"annotations": {"a": 1}}, r"annotations\['a'\] is not of type str"),
        ({"hooks": []}, "config.json.hooks is not of type dict"),
        ({"hooks": {"poststop": {}}}, "hooks.poststop is not of type list"),
        ({"hooks": {"poststop": ["/bin/x"]}}, r"hooks.poststop\[0\] is not of type dict"),
        (hooked(path="x"), r"hooks.poststop\[0\].path 'x' is not absolute"),
        (hooked(path=None), r"hooks.poststop\[0\].path '' is not absolute"),
        (hooked(args="x"), r"hooks.poststop\[0\].args is not of type list"),
        (hooked(env=["A"]), r"hooks.poststop\[0\].env: 'A' is not NAME=value"),
        (hooked(env=["=A"]), r"hooks.poststop\[0\].env: '=A' is not NAME=value"),
        (hooked(timeout=0), r"hooks.poststop\[0\].timeout 0 is not greater than zero"),
        (hooked(timeout=1.5), r"hooks.poststop\[0\].timeout is not of type int"),
        (hooked(args=["x", "\0"]), r"hooks.poststop\[0\] has a NUL in it"),
    ],
)
def test_a_field_of_another_type_is_named(document: object, field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"OCI spec: {field}"):
        oci.parse(document)


def test_a_hook_is_told_what_it_is_called_and_has_its_own_environment() -> None:
    found = oci.parse(hooked(args=["called", "so"], env=["A=1", "B=x=y", "A=2"], timeout=7)).hooks
    assert found == {"poststop": (oci.Hook("/bin/x", ("called", "so"), {"A": "2", "B": "x=y"}, 7),)}
    assert oci.parse(hooked()).hooks == {"poststop": (oci.Hook("/bin/x", ("/bin/x",), {}, 0),)}


@pytest.mark.parametrize(
    ("kind", "options", "bind"),
    [
        ("bind", [], True),
        ("none", ["rbind"], True),
        ("", ["bind"], True),
        ("tmpfs", ["ro"], False),
        ("proc", [], False),
    ],
)
def test_a_bind_is_told_by_its_type_or_by_an_option(kind: str, options: list[str], bind: bool) -> None:
    mount = oci.parse({"mounts": [{"destination": "/x", "type": kind, "options": options}]}).mounts[0]
    assert mount.is_bind is bind
