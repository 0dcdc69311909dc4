"""The configuration of a private casemate: what this host has, and whether machines may be restored.

A checkout that is measured may be older or newer than this one: only keys that its own default.toml has are
written.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from config.settings import Settings

DEFAULTS = Path("config/default.toml")
OF_THE_HOST = ("accel", "transport", "qemu", "qemu_user", "virtiofsd", "firmware")
"""What an operator tells of a host, beside how long things may take; how pods are made is the default."""
REFILL_S = 10.0
"""A turn is over before another machine is made for the pool: measured is a start that has found one."""
TIMEOUTS = "timeouts"
TEMPLATE = "template"
"""The profile's key that says which template a pod may be restored from; "off" has it booted."""
FILES = "files"
"""The profile's key that says how files come to a guest."""


def known(checkout: Path) -> dict[str, Any]:
    """Every key that a checkout of casemate has, with its default."""
    return tomllib.loads((checkout / DEFAULTS).read_text())


def restores(checkout: Path, template: str) -> bool:
    """Whether pods of a checkout come to be restored. template: what a way asks for, "" for the default."""
    default = known(checkout)["profiles"]["default"].get(TEMPLATE, "off")
    return bool((template or default) != "off")


def written(
    checkout: Path,
    host: Settings,
    *,
    images: Path,
    templates: Path,
    image: str,
    template: str = "",
    files: str = "",
    pool: int = 0,
) -> str:
    """TOML. image is a name or digest; template, files: values of these keys, or "" for the default. pool:
    how many machines of the default profile wait."""
    keys = known(checkout)
    general = {name: getattr(host, name) for name in OF_THE_HOST}
    general |= {"image_dir": str(images), "template_dir": str(templates)}
    profile = {"image": image} | {
        key: value for key, value in ((TEMPLATE, template), (FILES, files)) if value
    }
    lines = list(_lines(general, keys))
    if limits := list(_lines(vars(host.timeouts), keys.get(TIMEOUTS, {}))):
        lines += [f"[{TIMEOUTS}]", *limits]
    if pool:
        refill = [f"pool_refill_s = {REFILL_S}"] if "pool_refill_s" in keys["node"] else []
        lines += ["[node]", f"pool = {{ default = {pool} }}", *refill]
    lines += ["[profiles.default]", *_lines(profile, keys["profiles"]["default"])]
    return "\n".join(lines) + "\n"


def _lines(values: Mapping[str, object], known: Mapping[str, object]) -> Iterator[str]:
    return (f"{name} = {json.dumps(value)}" for name, value in values.items() if name in known)
