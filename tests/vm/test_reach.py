"""What QEMU reaches of the host's files: with Landlock its own pod's, whatever its user may do elsewhere."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim import landlock
from tests.vm import faults
from tests.vm.faults import refused
from tests.vm.pods import Pods

pytestmark = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
SECRET = "everybody may read this"
NOTICED_S = 30.0
PLACES = ("/tmp", "/var/tmp", "/dev/shm")


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A directory in which everybody may read and write, with a file."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    directory.chmod(0o1777)
    (directory / "file").write_text(SECRET)
    (directory / "file").chmod(0o644)
    yield directory
    shutil.rmtree(directory)
    for place in PLACES:
        Path(place, "casemate-nosy").unlink(missing_ok=True)


def nosy(pods: Pods, directory: Path) -> str:
    """A QEMU that looks around instead of running a guest, and says what it found."""
    looks = f"""\
        id -u >&2
        cat {directory}/file >&2
        echo mine >{directory}/made
        for place in {" ".join(PLACES)}; do echo x >$place/casemate-nosy; done
        pod=$(echo "$*" | grep -o '/[^ ,:"=]*/pods/[^ ,:"=/]*' | head -n 1)
        ls -d $pod/libvirt >&2
        ls $pod/files/shared >&2
        echo looked >&2
        exit 1"""
    return faults.as_machine(pods.ctr.instance, "qemu-nosy", looks)


def test_what_everybody_may_read_and_write_is_not_qemus(pods: Pods, open_to_all: Path) -> None:
    pods.ctr.instance.configure(f'qemu = "{nosy(pods, open_to_all)}"\n')
    result = pods.run("true")
    refused(result, "QEMU", "looked", f"{open_to_all}/file: Permission denied", within_s=NOTICED_S)
    assert SECRET not in result.err
    assert not (open_to_all / "made").exists()
    assert not [place for place in PLACES if Path(place, "casemate-nosy").exists()]
    # Of its pod it has what libvirt has made for it, and not what containers are served.
    assert re.search(r"^\S*/pods/[^/]+/libvirt$", result.err, re.MULTILINE)
    assert re.search(r"/files/shared'?: Permission denied", result.err)
    # It is not its user who was refused.
    (uid, *_) = map(int, re.findall(r"\b2\d{9}\b", result.err))
    words = subprocess.run(
        ["cat", open_to_all / "file"], user=uid, capture_output=True, text=True, check=True
    )
    assert words.stdout == SECRET


def test_an_operator_may_let_it_reach_more(pods: Pods, open_to_all: Path) -> None:
    lines = f'qemu = "{nosy(pods, open_to_all)}"\nqemu_paths = ["{open_to_all}"]\n'
    pods.ctr.instance.configure(lines)
    result = pods.run("true")
    refused(result, "looked", SECRET, within_s=NOTICED_S)
    assert (open_to_all / "made").read_text() == "mine\n"
