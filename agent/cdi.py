"""Applies a specification of the Container Device Interface (CDI 0.5.0, "OCI Edits") to a
container's config.json.

Must not know whose devices they are.
"""

from __future__ import annotations

from rpc.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    Json = dict[str, Any]


def apply(spec: Json, specification: Json, names: Iterable[str]) -> None:
    """The edits of the named devices, then those for all; what the container mounts itself stays as it is.

    Raises NotFound for a name that is not in the specification.
    """
    devices = {each["name"]: each["containerEdits"] for each in specification["devices"]}
    for name in names:
        if name not in devices:
            raise NotFound(f"there is no device {specification['kind']}={name} in this guest")
        _edit(spec, devices[name])
    _edit(spec, specification.get("containerEdits") or {})


def _edit(spec: Json, edits: Json) -> None:
    process = spec["process"]
    for line in edits.get("env") or ():
        name = line.partition("=")[0]
        kept = [each for each in process.get("env") or () if each.partition("=")[0] != name]
        process["env"] = [*kept, line]
    linux = spec.setdefault("linux", {})
    devices = linux.setdefault("devices", [])
    rules = linux.setdefault("resources", {}).setdefault("devices", [])
    for node in edits.get("deviceNodes") or ():
        devices[:] = [each for each in devices if each.get("path") != node["path"]]
        number = {"type": node["type"], "major": node["major"], "minor": node["minor"]}
        devices.append({"path": node["path"], "fileMode": node["fileMode"], **number})
        rules.append({"allow": True, "access": node["permissions"], **number})
    mounts = spec.setdefault("mounts", [])
    taken = {each.get("destination") for each in mounts}
    for mount in edits.get("mounts") or ():
        if mount["containerPath"] not in taken:
            mounts.append(
                {
                    "destination": mount["containerPath"],
                    "type": "bind",
                    "source": mount["hostPath"],
                    "options": list(mount["options"]),
                }
            )
    for hook in edits.get("hooks") or ():
        # The guest's own hooks are told where the root is, and write to it also where it is to be read-only:
        # crun would make it so before it runs them (runc does after), so it is the last thing that they do.
        words = [*hook["args"], f"--root={spec['root']['path']}"]
        if spec["root"].get("readonly"):
            spec["root"]["readonly"] = False
            words.append("--readonly")
        entry = {"path": hook["path"], "args": words}
        spec.setdefault("hooks", {}).setdefault(hook["hookName"], []).append(entry)
