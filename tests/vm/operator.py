"""The operator's command, run as one would on the host that a test's containerd is on."""

import os
import subprocess
import sys
import sysconfig

from bench.instance import CHECKOUT, SYSTEM_PYTHON_PACKAGES, Instance

PROGRAM = """\
import sys
sys.path[1:1] = {path!r}
sys.argv[0] = "casemate"
from cli.main import app
app()
"""
COMMAND_S = 180.0


def casemate(instance: Instance, *argv: str) -> subprocess.CompletedProcess[str]:
    """`casemate ARGV...` of this checkout, its output as text."""
    path = [str(CHECKOUT), sysconfig.get_path("purelib"), SYSTEM_PYTHON_PACKAGES]
    python = os.path.realpath(sys.executable)
    return subprocess.run(
        instance.inside(python, "-IS", "-c", PROGRAM.format(path=path), *argv),
        env=instance.env(),
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
