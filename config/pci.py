"""How a PCI function's address is written: 0000:3b:00.0. For the operator's schema and vfio/address.py."""

import re

# Four digits of a domain, or more: Intel's VMD and Hyper-V number theirs from 0x10000 on, and NVIDIA's tools
# write eight. lspci and libvirt's users leave out 0000. A slot is at most 1f.
FORM = re.compile(
    r"(?:(?P<domain>[0-9a-f]{4,8}):)?(?P<bus>[0-9a-f]{2}):(?P<slot>[01][0-9a-f])\.(?P<function>[0-7])",
    re.IGNORECASE | re.ASCII,
)


def address(text: str) -> str:
    """As the kernel writes it, of any form that is understood. Raises ValueError."""
    found = FORM.fullmatch(text)
    if found is None:
        raise ValueError(f"{text[:40]!r} is not a PCI address such as 0000:3b:00.0")
    domain = int(found["domain"] or "0", 16)
    return f"{domain:04x}:{found['bus']}:{found['slot']}.{found['function']}".lower()
