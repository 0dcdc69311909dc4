"""libvirt without CPU models: what it does not read, what is not kept, and which libvirt has it so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shim.vm import cpu_models
from shim.vm.cpu_models import without_models

CHECKOUT = Path(__file__).resolve().parents[3]

# As libvirt 9.0 and 12.8 write it, shortened by lines alone.
LEARNT = b"""\
<qemuCaps>
  <emulator>/usr/bin/qemu-system-x86_64</emulator>
  <flag name='kvm'/>
  <hostCPU type='tcg' model='base' migratability='yes'>
    <property name='cmov' type='boolean' value='true' migratable='yes'/>
  </hostCPU>
  <cpu type='tcg' name='max' typename='max-x86_64-cpu' usable='yes'/>
  <cpu type='tcg' name='Snowridge' typename='Snowridge-x86_64-cpu' usable='no'>
    <blocker name='pcid'/>
    <blocker name='x2apic'/>
  </cpu>
  <cpu type='tcg' name='486' typename='486-x86_64-cpu' usable='yes'/>
  <machine type='tcg' name='pc-i440fx-7.2' alias='pc' hotplugCpus='yes' maxCpus='255' defaultCPU='qemu64'/>
  <machine type='tcg' name='pc-q35-7.2' alias='q35' hotplugCpus='yes' maxCpus='288' defaultCPU='qemu64'/>
  <machine type='tcg' name='none' maxCpus='1'/>
</qemuCaps>
"""
LEAN = b"""\
<qemuCaps>
  <emulator>/usr/bin/qemu-system-x86_64</emulator>
  <flag name='kvm'/>
  <hostCPU type='tcg' model='base' migratability='yes'>
    <property name='cmov' type='boolean' value='true' migratable='yes'/>
  </hostCPU>
  <machine type='tcg' name='pc-q35-7.2' alias='q35' hotplugCpus='yes' maxCpus='288' defaultCPU='qemu64'/>
</qemuCaps>
"""

HIDES = """\
import sys
from pathlib import Path
from shim import system
from shim.vm import cpu_models
system.unshare(system.CLONE_NEWNS)
system.mount("none", "/", None, system.MS_REC | system.MS_SLAVE)
cpu_models.INDEX = Path(sys.argv[1])
cpu_models.hide(Path(sys.argv[2]))
print(cpu_models.INDEX.read_text(), *sorted(path.name for path in cpu_models.INDEX.parent.iterdir()))
"""


def test_what_is_kept_has_features_and_machines_like_ours_but_no_models() -> None:
    assert without_models(LEARNT) == LEAN
    assert without_models(LEAN) == LEAN


@pytest.mark.parametrize("text", [b"", b"<qemuCaps/>\n", b"<qemuCaps>\n<cpu>no end\n</qemuCaps>\n"])
def test_what_is_written_otherwise_is_kept_as_it_is(text: bytes) -> None:
    assert without_models(text) == text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("missing", ["", *cpu_models.NEEDED])
def test_models_are_hidden_in_one_mount_namespace_and_only_if_the_features_stay(
    tmp_path: Path, missing: str
) -> None:
    known, pod = tmp_path / "cpu_map", tmp_path / "pod"
    known.mkdir()
    pod.mkdir()
    index = known / "index.xml"
    index.write_text("<cpus>all</cpus>\n")
    for name in (*cpu_models.NEEDED, "x86_486.xml"):
        if name != missing:
            (known / name).touch()
    done = subprocess.run(
        [sys.executable, "-c", HIDES, str(index), str(pod)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=True,
    )
    seen, _, names = done.stdout.partition("\n")
    assert seen == ("<cpus>all</cpus>" if missing else cpu_models.LEAN_INDEX.strip())
    assert names.split() == sorted(path.name for path in known.iterdir())
    assert index.read_text() == "<cpus>all</cpus>\n"


def test_a_host_without_libvirts_index_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_models, "INDEX", tmp_path / "index.xml")
    cpu_models.hide(tmp_path)
    assert not list(tmp_path.iterdir())
