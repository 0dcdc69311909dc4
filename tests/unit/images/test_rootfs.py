"""The root file system and the agent in it, built and run with this machine's own Python as the guest's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from images import rootfs
from images.bytecode import GuestPython, find_python
from images.guest import main as first
from rpc.errors import CasemateError, FailedPrecondition, NotFound
from tests.unit.images.fakes import agent_source, python_tree


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> GuestPython:
    tree = tmp_path_factory.mktemp("tree")
    python_tree(tree)
    return find_python(tree)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, python: GuestPython) -> Path:
    """A root file system before the agent is added."""
    target = tmp_path_factory.mktemp("root")
    rootfs.populate(python.tree, python, target)
    return target


@pytest.fixture
def root(tmp_path: Path, base: Path) -> Path:
    return shutil.copytree(base, tmp_path / "root", symlinks=True)


def run_first(root: Path) -> "subprocess.CompletedProcess[str]":
    """Runs main.pyc as the guest would, with its directory where it is on this machine."""
    code = root / rootfs.CODE.lstrip("/")
    program = f"import sys; sys.path.insert(0, {str(code)!r}); import main; main.CODE = {str(code)!r};"
    program += f"main.BUNDLE = {str(code / 'bundle')!r}; main.main()"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False
    )


def test_populate_takes_what_is_needed_and_no_more(python: GuestPython, base: Path) -> None:
    target = base
    assert (target / "usr/bin/python3").resolve() == target / python.program
    assert (target / "bin/sh").readlink() == Path("busybox")
    assert (target / "usr/lib/x86_64-linux-gnu/libc.so.6").is_file()
    assert (target / python.library / "asyncio/base_events.pyc").is_file()
    assert (target / python.library / "lib-dynload").is_dir()
    assert not list(target.rglob("*.py"))
    assert not list(target.rglob("__pycache__"))
    for unwanted in ("test", "idlelib", "tkinter", "ensurepip", "ssl.pyc"):
        assert not (target / python.library / unwanted).exists()
    done = GuestPython(target, python.version).execute(
        "import asyncio, ctypes, json, socket; print(asyncio.__file__)"
    )
    assert done.decode().startswith(str(target))


def test_the_agent_runs_from_the_bundle(tmp_path: Path, python: GuestPython, root: Path) -> None:
    body = "print(rpc.errors.WORD, json.__spec__.loader.__class__.__name__, sys.modules['agent'].__path__)"
    rootfs.add_agent(root, python, agent_source(tmp_path / "source", body))
    done = run_first(root)
    assert done.stderr == ""
    assert done.stdout.split() == ["from", "rpc", "Finder", f"['{rootfs.CODE}/agent']"]


def test_what_is_not_in_the_bundle_is_found_as_usual(tmp_path: Path, python: GuestPython, root: Path) -> None:
    body = "import colorsys; print(colorsys.__spec__.loader.__class__.__name__)"
    rootfs.add_agent(root, python, agent_source(tmp_path / "source", body))
    assert run_first(root).stdout.strip() in ("SourceFileLoader", "SourcelessFileLoader")


def test_the_finder_leaves_other_names_alone() -> None:
    assert first.Finder({}).find_spec("agent") is None


def test_an_agent_that_cannot_be_compiled_fails_the_build(
    tmp_path: Path, python: GuestPython, root: Path
) -> None:
    with pytest.raises(FailedPrecondition, match="status 1") as caught:
        rootfs.add_agent(root, python, agent_source(tmp_path / "source", "this is no Python"))
    assert "SyntaxError" in str(caught.value.details)


def test_an_agent_that_cannot_be_imported_fails_the_build(
    tmp_path: Path, python: GuestPython, root: Path
) -> None:
    source = agent_source(tmp_path / "source")
    (source / "agent/__main__.py").write_text("import no_such_module\n")
    with pytest.raises(FailedPrecondition) as caught:
        rootfs.add_agent(root, python, source)
    assert "no_such_module" in str(caught.value.details)


def test_no_agent_is_an_error(tmp_path: Path, python: GuestPython, root: Path) -> None:
    with pytest.raises(NotFound, match="no agent"):
        rootfs.add_agent(root, python, tmp_path)


def test_modules_and_their_list_are_added(tmp_path: Path) -> None:
    rootfs.add_modules(tmp_path, "vsock: /usr/lib/modules/a.ko\n", {"a.ko": b"A"}, "pci:v*d* a\n")
    assert (tmp_path / "usr/lib/modules/a.ko").read_bytes() == b"A"
    assert (tmp_path / "usr/lib/casemate/modules.txt").read_text() == "vsock: /usr/lib/modules/a.ko\n"
    assert (tmp_path / "usr/lib/casemate/drivers.txt").read_text() == "pci:v*d* a\n"


def test_a_program_that_is_missing_from_the_packages_is_an_error(tmp_path: Path, python: GuestPython) -> None:
    tree = tmp_path / "tree"
    python_tree(tree)
    (tree / "usr/bin/crun").unlink()
    target = tmp_path / "root"
    target.mkdir()
    with pytest.raises((CasemateError, FileNotFoundError), match="crun"):
        rootfs.populate(tree, find_python(tree), target)


def test_the_file_system_depends_on_content_only(tmp_path: Path) -> None:
    images = []
    for turn, order in enumerate((("a", "b"), ("b", "a"))):
        root = tmp_path / str(turn)
        (root / "tmp").mkdir(parents=True)
        for name in order:
            (root / name).write_text(name * 5000)
            os.utime(root / name, (turn, turn))
        (root / "a").chmod(0o600 if turn else 0o644)
        (root / "link").symlink_to("a")
        images.append(tmp_path / f"{turn}.erofs")
        rootfs.make_erofs(root, images[-1])
    assert images[0].read_bytes() == images[1].read_bytes()
    (tmp_path / "0/a").write_text("changed")
    rootfs.make_erofs(tmp_path / "0", tmp_path / "2.erofs")
    assert (tmp_path / "2.erofs").read_bytes() != images[0].read_bytes()
