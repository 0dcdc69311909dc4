"""What a single value may look like: sizes, CPU counts, image names, kernel parameters, sets of devices.

Shared by the operator's schema and by pods' annotations, which are hostile. Each function
returns the checked value or raises ValueError with words that fit after the key's name.
"""

import re
from collections.abc import Mapping, Sequence

MIB = 1 << 20
LEAST_MEMORY_BYTES = 48 * MIB  # below, the guest's kernel does not reach its agent
MOST_VCPUS = 4096  # what QEMU's q35 takes
MOST_CMDLINE = 1024  # x86's limit is 2048 with what casemate adds

_UNITS = {"": 1, "K": 1 << 10, "M": MIB, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,6}))? ?(?:([KMGT])(?:i?B|i)?|B)?", re.ASCII)
_IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}", re.ASCII)
_CMDLINE = re.compile(r"[\x20-\x7e]*", re.ASCII)
_CPU_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+,=-]{0,255}", re.ASCII)
# The specification allows a single letter. Readers before 1.0, as that of containerd 1.7, panic at it.
_CDI_WORD = r"[A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]"
_CDI_KIND = re.compile(f"{_CDI_WORD}/{_CDI_WORD}", re.ASCII)
_PROFILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)


def size(value: object) -> int:
    """Bytes of "256MiB", "2G", "1.5GiB" or a number of bytes.

    K, M, G and T are powers of 1024 with or without an i, as for QEMU and systemd; "MB" and the
    like are refused, because half of the world means powers of 1000 by them.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('must be a size such as "256MiB"')
    if isinstance(value, int):
        if value < 0:
            raise ValueError("must not be negative")
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f'{value[:40]!r} is not a size such as "256MiB"')
    whole, fraction, unit = match.groups()
    if value.strip().endswith("B") and unit and "i" not in value:
        raise ValueError(f'{value!r} may mean powers of 1000 or of 1024: write "{whole}{unit}iB"')
    factor = _UNITS[unit or ""]
    result = int(whole) * factor
    if fraction:
        part = int(fraction) * factor
        if part % 10 ** len(fraction):
            raise ValueError(f"{value!r} is not a whole number of bytes")
        result += part // 10 ** len(fraction)
    return result


def memory(value: object) -> int:
    """A guest's memory in bytes: whole MiB, at least what a guest boots with."""
    result = size(value)
    if result < LEAST_MEMORY_BYTES:
        raise ValueError(f"must be at least {LEAST_MEMORY_BYTES // MIB}MiB")
    if result % MIB:
        raise ValueError("must be a whole number of MiB")
    return result


def vcpus(value: int) -> int:
    if not 1 <= value <= MOST_VCPUS:
        raise ValueError(f"must be from 1 to {MOST_VCPUS}")
    return value


def memory_or_all(value: object) -> int:
    """0 means all that the host has."""
    return memory(value) if size(value) else 0


def vcpus_or_all(value: int) -> int:
    """0 means all that the host has."""
    return vcpus(value) if value else 0


def image(value: str) -> str:
    if not _IMAGE.fullmatch(value):
        raise ValueError("must be the name or digest of a guest image")
    return value


def kernel_cmdline(value: str) -> str:
    if len(value) > MOST_CMDLINE:
        raise ValueError(f"must not be longer than {MOST_CMDLINE} characters")
    if not _CMDLINE.fullmatch(value):
        raise ValueError("must be printable ASCII on one line")
    reserved = [word for word in value.split() if word.startswith("casemate.")]
    if reserved:
        raise ValueError(f"{reserved[0]}: parameters that begin with casemate. are casemate's own")
    return value


def cpu_model(value: str) -> str:
    if not _CPU_MODEL.fullmatch(value):
        raise ValueError('must be a CPU model of QEMU\'s, or "auto"')
    return value


def cpu_policy(value: str) -> str:
    if value not in ("shared", "dedicated"):
        raise ValueError(f'{value[:40]!r} is neither "shared" nor "dedicated"')
    return value


def profile_name(value: str) -> str:
    if not _PROFILE.fullmatch(value):
        raise ValueError("must be letters, digits, dots, dashes and underscores")
    return value


def absolute_path(value: str) -> str:
    if not value.startswith("/") or "\0" in value or "\n" in value:
        raise ValueError("must be an absolute path")
    return value


def absolute_path_or_none(value: str) -> str:
    if not value:
        return value
    try:
        return absolute_path(value)
    except ValueError:
        raise ValueError('must be an absolute path, or "" for none') from None


def absolute_path_or_auto(value: str) -> str:
    if value == "auto":
        return value
    try:
        return absolute_path(value)
    except ValueError:
        raise ValueError('must be an absolute path or "auto"') from None


def cdi_kind(value: str) -> str:
    """A vendor and a class of the Container Device Interface, as its readers take them."""
    if not _CDI_KIND.fullmatch(value) or len(value) > 128:
        raise ValueError(f'{value[:80]!r} is not a kind of CDI such as "nvidia.com/pgpu"')
    return value


def partition_name(value: str) -> str:
    """Of an NVLink partition: a fabric manager's number, or whatever the operator calls it."""
    return profile_name(value)


def partition_members(value: list[str]) -> list[str]:
    """value: addresses as config.pci.address() gives them."""
    if not value:
        raise ValueError("must name the GPUs of the partition")
    for address in value:
        if value.count(address) > 1:
            raise ValueError(f"{address} is in it twice")
    return value


def partitions(value: Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
    """Members by name: of two with the same ones nobody could say which of them a pod has."""
    names: dict[frozenset[str], str] = {}
    for name, members in value.items():
        other = names.setdefault(frozenset(members), name)
        if other != name:
            raise ValueError(f"{other} and {name} are of the same devices")
    return value
