"""The demo's OCI image: built from Debian packages once, for the demo and for the tests.

Knows where its archive is kept; must not know who imports it.
"""

from hashlib import sha256
from pathlib import Path

from images import oci
from scripts.host import CACHE, CHECKOUT, say

HOME = CACHE / "oci"
MADE_BY = ("images/oci.py", "images/packages.py")


def archive() -> tuple[Path, str]:
    """The archive, and the digest under which containerd will hold it. Rebuilt when its recipe changes."""
    recipe = sha256(b"".join((CHECKOUT / name).read_bytes() for name in MADE_BY)).hexdigest()[:16]
    path = HOME / f"demo-{recipe}.tar"
    digest = path.with_suffix(".digest")
    if not (path.exists() and digest.exists()):
        HOME.mkdir(parents=True, exist_ok=True)
        say(f"building {oci.DEMO} from Debian packages")
        digest.write_text(oci.write_demo(path))
    return path, digest.read_text()
