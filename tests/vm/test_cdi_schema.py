"""The files of `casemate cdi generate`, by the Container Device Interface's public JSON schema and reader.

Both are those of the specification's project, at the release that containerd 1.7 has (tests/vm/go/cdicheck).
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.vfio.cdihosts import ANY, FIRST, NETWORK, PGPU, SECOND, SOUND, bound, listed, small
from tests.unit.vfio.kernels import Kernel
from tests.vm import builds
from vfio import cdi

Change = Callable[[Any], object]


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    kernel = Kernel(small(tmp_path / "host"))
    bound(kernel, FIRST, SOUND, SECOND, NETWORK)
    return kernel


def said_of(spec: Any) -> str:
    """What is wrong with it, or nothing."""
    done = subprocess.run(
        [builds.cdicheck()], input=json.dumps(spec), capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.returncode == bool(done.stdout)
    return done.stdout


@pytest.mark.parametrize("kind", [PGPU, ANY, "nvidia.com/gpu", "casemate.dev/of.mine", "ab/cd"])
@pytest.mark.parametrize("iommufd", [False, True])
def test_the_file_is_valid(kernel: Kernel, tmp_path: Path, kind: str, iommufd: bool) -> None:
    dev = tmp_path / "dev"
    (dev / "vfio/devices").mkdir(parents=True)
    if iommufd:
        (dev / "iommu").touch()
        for number in range(1, 5):
            (dev / f"vfio/devices/vfio{number}").touch()
    spec = cdi.spec(listed(kernel, kind, dev=str(dev)))
    form = "/dev/vfio/devices/vfio" if iommufd else "/dev/vfio/"
    assert f'"{form}' in json.dumps(spec)
    assert said_of(spec) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda spec: spec.pop("kind"), "schema: "),
        (lambda spec: spec["devices"][0].pop("containerEdits"), "schema: "),
        (lambda spec: spec["devices"][0]["containerEdits"]["deviceNodes"][0].pop("path"), "schema: "),
        (lambda spec: spec["devices"][0].update(name=0), "schema: "),
        (lambda spec: spec["devices"][0]["containerEdits"].update(deviceNodes={}), "schema: "),
        (lambda spec: spec.update(cdiVersion="0.3.0"), "reader: "),  # a name that begins with a digit
        (lambda spec: spec.update(kind="nvidia.com"), "reader: "),
        (lambda spec: spec.update(colour="red"), "reader: "),
    ],
)
def test_what_is_not_valid_is_found(kernel: Kernel, change: Change, words: str) -> None:
    spec = json.loads(json.dumps(cdi.spec(listed(kernel, PGPU))))
    change(spec)
    said = said_of(spec)
    assert said
    assert said.startswith(words)
