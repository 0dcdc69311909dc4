"""What a pod's own annotations change about its profile, as far as the operator lets them.

Annotations come from whoever may start a pod: every value is checked, and an annotation that is
not honoured is an error. Must not know who asks (shim, check) nor what a machine is made of.
"""

from config import values
from config.settings import Profile, Settings
from rpc.errors import InvalidArgument, PermissionDenied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "dev.casemate."
PREFIXES = (PREFIX, "dev.casemate/")
PROFILE = PREFIX + "profile"
VCPUS = PREFIX + "vcpus"
MEMORY = PREFIX + "memory"
IMAGE = PREFIX + "image"
KERNEL_CMDLINE = PREFIX + "kernel-cmdline"
CPU_POLICY = PREFIX + "cpu-policy"
DEVICES = "dev.casemate/devices"
"""Which of the host's devices the pod is given (shim/devicewishes.py): it is no matter of the profile."""

KNOWN = (PROFILE, VCPUS, MEMORY, IMAGE, KERNEL_CMDLINE, CPU_POLICY, DEVICES)


def known(name: str) -> str:
    """name, if it is one of ours; else ValueError, as the schema wants it."""
    if name not in KNOWN:
        raise ValueError(f"{name!r} is not one of {', '.join(KNOWN)}")
    return name


def of_machine(annotations: "Mapping[str, str]") -> dict[str, str]:
    """Those that say what a pod's VM is to be."""
    return {name: value for name, value in annotations.items() if name.startswith(PREFIX)}


def apply(settings: Settings, profile: Profile, annotations: "Mapping[str, str]") -> Profile:
    """profile as the annotations change it; others than ours (PREFIXES) are not looked at.

    dev.casemate.profile comes first, whatever the order, and the others change what it named.
    Raises InvalidArgument for an unknown name or a malformed value, PermissionDenied for one
    that the operator does not allow.
    """
    asked = {name: value for name, value in annotations.items() if name.startswith(PREFIXES)}
    for name in sorted(asked):
        _permit(settings, name)
    if PROFILE in asked:
        profile = _named(settings, asked[PROFILE])
    try:
        name = VCPUS
        if name in asked:
            profile = profile.replace(vcpus=_count(asked[name]))
        name = MEMORY
        if name in asked:
            profile = profile.replace(memory_bytes=values.memory(asked[name]))
        name = IMAGE
        if name in asked:
            profile = profile.replace(image=values.image(asked[name]))
        name = KERNEL_CMDLINE
        if name in asked:
            both = f"{profile.kernel_cmdline} {values.kernel_cmdline(asked[name])}".strip()
            profile = profile.replace(kernel_cmdline=values.kernel_cmdline(both))
        name = CPU_POLICY
        if name in asked:
            profile = profile.replace(cpu_policy=values.cpu_policy(asked[name]))
    except ValueError as error:
        raise InvalidArgument(f"annotation {name}: {error}") from None
    return profile


def _permit(settings: Settings, name: str) -> None:
    if name not in KNOWN:
        from config.nearest import did_you_mean

        raise InvalidArgument(
            f"annotation {name[:80]!r} is unknown",
            hint=did_you_mean(name, KNOWN) or f"known are {', '.join(KNOWN)}",
        )
    if name not in settings.allowed_annotations:
        raise PermissionDenied(
            f"annotation {name} is not allowed on this host",
            hint=f'the operator can add it to allowed_annotations: "{name}"',
        )


def _named(settings: Settings, wanted: str) -> Profile:
    if wanted not in settings.profiles:
        from config.nearest import did_you_mean

        known = sorted(settings.profiles)
        raise InvalidArgument(
            f"annotation {PROFILE}: no profile {wanted[:80]!r}",
            hint=did_you_mean(wanted, known) or f"known are {', '.join(known)}",
        )
    return settings.profiles[wanted]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise ValueError(f"{text[:40]!r} is not a number of CPUs")
    return values.vcpus(int(text))
