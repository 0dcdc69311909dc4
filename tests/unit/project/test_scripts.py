"""The scripts' decisions that change no machine: which system, which packages, which prefix, which Go."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from rpc.errors import AlreadyExists, CasemateError, FailedPrecondition, InvalidArgument
from scripts import golang, host, product, uninstall, venv
from scripts.manifest import start_time

BOOKWORM = 'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nID=debian\nVERSION_ID="12"\n'
TRIXIE = 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\nVERSION_ID="13"\n'
SID = 'PRETTY_NAME="Debian GNU/Linux sid"\nID=debian\n'
UBUNTU = 'PRETTY_NAME="Ubuntu 24.04 LTS"\nID=ubuntu\nID_LIKE=debian\nVERSION_ID="24.04"\n'


@pytest.mark.parametrize(("text", "has_virtiofsd"), [(BOOKWORM, False), (TRIXIE, True), (SID, True)])
def test_virtiofsd_is_a_package_of_its_own_from_debian_13(text: str, has_virtiofsd: bool) -> None:
    names = host.Distribution.read(text).names(host.RUNTIME_PACKAGES)
    assert ("virtiofsd" in names) is has_virtiofsd
    assert "containerd" in names


def test_another_distribution_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "os-release").write_text(UBUNTU)
    with pytest.raises(FailedPrecondition, match=r"Ubuntu 24\.04 LTS"):
        host.distribution(tmp_path / "os-release")


def test_packages_are_asked_of_dpkg() -> None:
    assert host.missing_packages(["dpkg", "casemate-no-such-package"]) == ["casemate-no-such-package"]


def test_a_package_that_provides_another_stands_for_it() -> None:
    listing = (
        "ii |containerd.io|containerd, runc (= 1.2), libx:any\n"
        "rc |crun|\n"  # removed, its configuration left
        "ii |gawk|awk\n"
    )
    assert host.held_packages(listing) == {"containerd.io", "containerd", "runc", "libx", "gawk", "awk"}


def test_a_failed_command_shows_its_words_and_a_line_to_paste() -> None:
    with pytest.raises(CasemateError) as caught:
        host.run(["sh", "-c", "echo out; echo 'no space' >&2; exit 7"], quiet=True)
    assert "exit code 7 from: sh -c 'echo out; echo" in caught.value.brief
    assert "no space" in str(caught.value.details)


@pytest.mark.parametrize("text", ["opt/casemate", "/opt/case mate", "/" + "x" * 101, "/opt/a\nb", ""])
def test_a_prefix_that_no_launcher_could_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="PREFIX="):
        product.checked_prefix(text)


def test_a_prefix_with_somebody_elses_files_is_refused() -> None:
    with pytest.raises(AlreadyExists, match="PREFIX=/usr"):
        product.checked_prefix("/usr")


def test_an_empty_or_absent_prefix_is_fine(tmp_path: Path) -> None:
    assert product.checked_prefix(f"{tmp_path}") == tmp_path
    assert product.checked_prefix(f"{tmp_path}//new/") == tmp_path / "new"


def test_the_launcher_runs_our_code_with_a_path_of_its_own(tmp_path: Path) -> None:
    """Neither PYTHONPATH, the working directory nor site's packages come in, and no bytecode is written."""
    prefix = tmp_path / "prefix"
    subprocess.run([venv.SYSTEM_PYTHON, "-m", "venv", "--without-pip", prefix], check=True)
    code = prefix / "code" / "1234"
    bootstrap = code / "shim/bootstrap.py"
    bootstrap.parent.mkdir(parents=True)
    bootstrap.write_text(
        "import sys\ndef main():\n    print(*sys.path, *sys.argv[1:], sep='\\n')\n    return 42\n"
    )
    script = tmp_path / "containerd-shim-casemate-v2"
    script.write_text(product.launcher(prefix, code, script.name))
    script.chmod(0o755)
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim/bootstrap.py").write_text("raise SystemExit('the working directory was searched')")
    done = subprocess.run(
        [script, "-id", "a"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 42, done.stderr
    *path, first, second = done.stdout.splitlines()
    assert path[-3:] == [str(code), str(venv.site_packages(prefix)), "/usr/lib/python3/dist-packages"]
    assert str(tmp_path) not in path
    assert (first, second) == ("-id", "a")
    assert not list(bootstrap.parent.glob("__pycache__"))


def test_code_that_a_pod_may_run_stays_when_newer_code_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "RUN", tmp_path / "run")
    versions = [tmp_path / "code" / name for name in ("c", "a", "b", "d")]
    for at, version in enumerate(versions):
        (version / "shim").mkdir(parents=True)
        os.utime(version, (at, at))
    (tmp_path / "run/pods/KEY").mkdir(parents=True)
    product.remove_old_code(versions[-1])
    assert all(version.is_dir() for version in versions)
    (tmp_path / "run/pods/KEY").rmdir()
    product.remove_old_code(versions[-1])
    assert [version.is_dir() for version in versions] == [False, False, True, True], (
        "a casemated may run the last"
    )


def test_a_lock_or_another_python_asks_for_a_new_environment(tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("a==1")
    before = venv.fingerprint([lock])
    assert venv.fingerprint([lock]) == before
    lock.write_text("a==2")
    assert venv.fingerprint([lock]) != before


def test_an_environment_is_never_made_over_somebody_elses_directory(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    lock = tmp_path / "lock.txt"
    lock.touch()
    with pytest.raises(AlreadyExists):
        venv.ensure(tmp_path, [lock], what="nothing")
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize(
    ("older", "newer"), [("1.19.8", "1.21"), ("1.9", "1.10"), ("1.25.0", "1.26.6"), ("1.24rc1", "1.25.0")]
)
def test_go_versions_compare_as_numbers(older: str, newer: str) -> None:
    assert golang.number(older) < golang.number(newer)


def test_the_newest_go_line_decides(tmp_path: Path) -> None:
    modules = []
    for number, version in enumerate(["1.9", "1.26.6", "1.24.0"]):
        modules.append(tmp_path / f"{number}.mod")
        modules[-1].write_text(f"module x\n\ngo {version}\n")
    assert golang.needed(modules) == "1.26.6"


def test_the_pinned_go_builds_every_module_of_the_tests() -> None:
    modules = list((host.CHECKOUT / "tests").rglob("go.mod"))
    assert modules
    assert golang.number(golang.PINNED) >= golang.number(golang.needed(modules))


def test_a_running_pod_stands_in_the_way_of_uninstalling(tmp_path: Path) -> None:
    for name, pid, started in (("alive", os.getpid(), start_time(os.getpid())), ("gone", os.getpid(), 1)):
        (tmp_path / "pods" / name).mkdir(parents=True)
        state = {"namespace": "default", "id": name, "pid": pid, "start_time": started}
        (tmp_path / "pods" / name / "state.json").write_text(json.dumps(state))
    assert uninstall.running_pods(tmp_path) == ["default/alive"]
