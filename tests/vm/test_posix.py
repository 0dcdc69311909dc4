"""What programs use of a file system, tried where a guest has it by virtio-fs. `make posix` tries more."""

from tests.posix.reasons import VIRTIOFS, known
from tests.posix.trying import LINUX, OK, read_linux
from tests.vm.pods import Pods

TRY_S = 60.0
"""Some hundred calls of each kind, emulated on a busy machine."""


def test_a_volume_is_as_a_local_file_system_but_for_what_the_page_has_a_reason_for(pods: Pods) -> None:
    volume = pods.ctr.instance.work / "tried"
    volume.mkdir()
    mount = ("--mount", f"type=bind,src={volume},dst=/volume,options=rbind:rw")
    with pods.detached("sleep", "1000", options=mount) as name:
        command = ("python3", "-c", LINUX.read_text(), "/volume/tried")
        output = pods.exec(name, *command, timeout_s=TRY_S).ok().out
    failed = [(test, outcome) for test, outcome in read_linux(output) if outcome != OK]
    assert [one for one in failed if not known(VIRTIOFS, "volume", one[0])] == []
