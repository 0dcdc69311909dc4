"""Block devices of the host's that a container asks for: which, where in the container, and for what.

Clients give a privileged container every device that the host happens to have: these were not asked for.

Pure: from linux.devices and the rules of linux.resources.devices. It must not know how a guest gets them.
"""

from collections.abc import Collection
from dataclasses import dataclass

from shim.oci import Document, Spec, typed

BLOCK = "b"
EVERY = "a"
DEFAULT_MODE = 0o660
_RULES = "linux.resources.devices"
_OF_A_RULE = (("allow", bool), ("type", str), ("major", int), ("minor", int), ("access", str))


@dataclass(frozen=True, slots=True)
class BlockDevice:
    """path: in the container. major, minor: the host's. mode: permission bits of the container's node."""

    path: str
    major: int
    minor: int
    mode: int
    uid: int
    gid: int
    read_only: bool


def asked_for(spec: Spec) -> tuple[BlockDevice, ...]:
    rules = _rules(spec.document)
    return tuple(
        BlockDevice(
            device.path,
            device.major,
            device.minor,
            DEFAULT_MODE if device.mode is None else device.mode & 0o777,
            device.uid,
            device.gid,
            not _may_write(rules, device.major, device.minor),
        )
        for device in spec.devices
        if device.type == BLOCK
    )


def may_use_all(spec: Spec) -> bool:
    """Whether the rules of its devices allow every one, as a privileged container's do."""
    allowed = False
    for rule in _rules(spec.document):
        if rule.get("allow") is not True:
            allowed = False
        elif rule.get("type") in (None, "", EVERY):
            numbers = {rule.get("major"), rule.get("minor")}
            allowed = allowed or (numbers <= {None, -1} and set(rule.get("access") or "rwm") == set("rwm"))
    return allowed


def without_rules(resources: Document, numbers: Collection[tuple[int, int]] = ()) -> Document:
    """A copy without rules for block devices, nor for these numbers of others: they are the host's."""
    if not resources.get("devices"):
        return resources
    kept = [
        rule
        for rule in _of(resources)
        if rule.get("type") != BLOCK and (rule.get("major"), rule.get("minor")) not in numbers
    ]
    return {**resources, "devices": kept}


def _rules(document: Document) -> list[Document]:
    linux = document.get("linux") or {}
    return _of(typed(linux.get("resources") or {}, dict, "linux.resources"))


def _of(resources: Document) -> list[Document]:
    rules = typed(resources.get("devices") or [], list, _RULES)
    for rule in rules:
        typed(rule, dict, f"{_RULES}[]")
        for name, kind in _OF_A_RULE:
            if (value := rule.get(name)) is not None:
                typed(value, kind, f"{_RULES}[].{name}")
    return rules


def _may_write(rules: list[Document], major: int, minor: int) -> bool:
    """The last rule that fits decides, as in devices cgroups; without one a runtime allows nothing."""
    allowed = False
    for rule in rules:
        fits = rule.get("type", EVERY) in (BLOCK, EVERY)
        for name, number in (("major", major), ("minor", minor)):
            wanted = rule.get(name)
            fits = fits and (wanted is None or wanted in (-1, number))
        if fits and "w" in (rule.get("access") or "rwm"):
            allowed = rule.get("allow") is True
    return allowed
