"""Which findings of vfio/isolation.py an operator may waive, by name: those that are a matter of judgement.

What the kernel would refuse all the same, and what destroys the host's own data, is not here. Knows the names
alone; what each one means is vfio/findings.py's, and docs/gpus.md's.
"""

WAIVABLE = (
    "noiommu",
    "noiommu-group",
    "interrupt-remapping",
    "unsafe-interrupts",
    "acs-override",
    "denylist-off",
    "acs-off",
    "switch-acs",
    "no-reset",
    "boot-display",
    "default-route",
    "vfs-enabled",
    "foreign-vf",
)


def known(code: str) -> str:
    """code, if it may be waived; else ValueError, as the schema wants it."""
    if code not in WAIVABLE:
        raise ValueError(f"{code!r} is not one of {', '.join(WAIVABLE)}")
    return code
