"""The words of the command line, and what containerd would not find."""

from pathlib import Path

import pytest

from bench import ways
from bench.instance import CHECKOUT, RUNTIME
from rpc.errors import InvalidArgument, NotFound


def test_the_known_ways() -> None:
    runc, casemate, boot = ways.parse_all(["runc", "casemate", "casemate-boot"])
    assert (runc.runtime, runc.options, runc.shim) == (ways.RUNC, (), "containerd-shim-runc-v2")
    assert (casemate.runtime, casemate.surroundings.template) == (RUNTIME, "")
    assert boot.surroundings.template == "off"
    assert [ways.parse(name).surroundings.casemated for name in ("casemate", "casemate-node")] == [
        False,
        True,
    ]
    assert ways.parse("crun").options == ("--runc-binary", "crun")


def test_containerds_own_name_of_a_runtime() -> None:
    way = ways.parse("io.containerd.runsc.v1")
    assert (way.name, way.shim) == ("io.containerd.runsc.v1", "containerd-shim-runsc-v1")
    assert ways.parse("gvisor=io.containerd.runsc.v1").name == "gvisor"


def test_another_checkout_is_another_casemate() -> None:
    base, this = ways.parse_all([f"base=casemate@{CHECKOUT}", "casemate"])
    assert base.name == "base"
    assert base.surroundings.checkout == CHECKOUT == this.surroundings.checkout


def test_the_guests_own_kernel_is_another_image() -> None:
    tuned, boot = ways.parse_all(["casemate-tuned", "casemate-tuned-boot"])
    assert (tuned.runtime, tuned.surroundings.image, tuned.surroundings.template) == (RUNTIME, "tuned", "")
    assert (boot.surroundings.image, boot.surroundings.template) == ("tuned", "off")


def test_how_files_come_is_a_way() -> None:
    found = [
        way.surroundings.files for way in ways.parse_all(["casemate", "casemate-9p", "casemate-virtiofs"])
    ]
    assert found == ["", "9p", "virtiofs"]


@pytest.mark.parametrize(
    "word",
    [
        *("", "podman", "io.containerd.v2", "x=", "runc@/", "casemate@/nowhere"),
        f"casemate-tuned@{CHECKOUT}",  # which has a guest image of its own
    ],
)
def test_what_means_no_runtime_is_refused(word: str) -> None:
    with pytest.raises(InvalidArgument):
        ways.parse(word)


def test_a_checkout_before_casemated_has_none(tmp_path: Path) -> None:
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim/bootstrap.py").touch()
    assert ways.parse(f"casemate@{tmp_path}").surroundings.checkout == tmp_path
    with pytest.raises(InvalidArgument, match="has no casemated"):
        ways.parse(f"casemate-node@{tmp_path}")


def test_two_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="two runtimes are called runc"):
        ways.parse_all(["runc", "runc"])
    assert len(ways.parse_all(["runc", "again=runc"])) == 2


def test_a_shim_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    way = ways.parse("io.containerd.nowhere.v9")
    with pytest.raises(NotFound, match="containerd-shim-nowhere-v9 is not installed"):
        ways.check_installed([way], tmp_path)
    (tmp_path / way.shim).touch(mode=0o755)
    ways.check_installed([way], tmp_path)
    assert ways.path_of(way, tmp_path) == str(tmp_path)


def test_only_a_hybrid_host_hides_the_empty_hierarchy(tmp_path: Path) -> None:
    assert ways.without_empty_unified(tmp_path) == ()
    (tmp_path / "cgroup.procs").touch()
    assert ways.without_empty_unified(tmp_path) == (str(tmp_path),)
