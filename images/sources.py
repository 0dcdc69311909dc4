"""The source of a Debian package as its authors released it, downloaded by apt, verified by its signatures.

Must not know what is made of it.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from images.run import run
from rpc.errors import FailedPrecondition


def source_version(version: str) -> str:
    """Of the source that a binary package was made of: a rebuild of Debian's (+b1) is of the same one."""
    return re.sub(r"\+b\d+$", "", version)


def fetch_source(package: str, version: str, lines: Sequence[str], target: Path) -> Path:
    """Downloads the .orig.tar of a package's source into the directory target.

    lines: of sources.list, for binaries. Raises FailedPrecondition with apt's own words.
    """
    with tempfile.TemporaryDirectory(prefix="casemate-sources-") as scratch:
        home = Path(scratch)
        for name in ("lists/partial", "archives/partial"):
            (home / name).mkdir(parents=True)
        (home / "status").touch()
        sources = home / "sources.list"
        sources.write_text("".join(f"deb-src {line.removeprefix('deb ')}\n" for line in lines))
        settings = {
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": home / "lists",
            "Dir::State::status": home / "status",
            "Dir::Cache": home,
            "APT::Sandbox::User": "root",  # who downloads into directories of root's
        }
        apt = ["apt-get", "--quiet", *(f"-o{name}={value}" for name, value in settings.items())]
        run([*apt, "update"], package="apt")
        wanted = f"{package}={version}"
        run(
            [*apt, "source", "--download-only", "--tar-only", "--only-source", wanted],
            cwd=target,
            package="apt",
        )
    found = sorted(target.glob("*.orig.tar.*"))
    if len(found) != 1:
        raise FailedPrecondition(f"apt-get left no single source of {wanted}", f"found {found}")
    return found[0]
