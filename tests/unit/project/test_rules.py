"""Rules of the whole checkout that no tool holds: foreign imports, lengths, hosts, what pages promise."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import clients

CHECKOUT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
PACKAGES: list[str] = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
OURS = {*PACKAGES, "scripts", "tests"}
# What comes with the host's libvirt, and must not come from an index.
FROM_DEBIAN = {"libvirt", "libvirt_qemu"}
# The standard library's, in other versions of Python than the one that runs this.
STANDARD = {*sys.stdlib_module_names, "_sha256", "_sha2"}
# Import name -> distribution, where they differ.
DISTRIBUTIONS = {"grpc": "grpcio", "google": "protobuf", "grpc_tools": "grpcio-tools", "yaml": "pyyaml"}
LONGEST_MODULE = 500
LONGEST_TEST = 900  # a list, of which one reads an entry at a time


def tracked(*patterns: str) -> list[Path]:
    """Files that git holds, or would: what is new and not ignored counts too."""
    argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", *patterns]
    listed = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, check=True).stdout.decode()
    return [path for name in listed.split("\0") if name and (path := CHECKOUT / name).is_file()]


def imports(path: Path) -> Iterator[str]:
    """The first name of every import in a module, wherever it stands in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def foreign(package: str) -> dict[str, Path]:
    """What a package imports that is neither the standard library's nor ours -> a module that does."""
    found = {}
    for path in (CHECKOUT / package).rglob("*.py"):
        for name in imports(path):
            if name not in STANDARD and name not in OURS:
                found[name] = path
    return found


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~ \[;]", requirement)[0].lower() for requirement in requirements}


@pytest.mark.parametrize("package", ["agent", "images", "rpc", "scripts"])
def test_what_runs_without_our_environment_imports_the_standard_library_only(package: str) -> None:
    assert foreign(package) == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_of_the_product_is_declared(package: str) -> None:
    declared = names(PROJECT["project"]["dependencies"])
    used = {name: DISTRIBUTIONS.get(name, name) for name in foreign(package) if name not in FROM_DEBIAN}
    assert {name for name, distribution in used.items() if distribution not in declared} == set()


def test_every_import_of_the_tests_is_declared() -> None:
    extras = PROJECT["project"]["optional-dependencies"]["dev"]
    declared = names(PROJECT["project"]["dependencies"]) | names(extras)
    used = {DISTRIBUTIONS.get(name, name) for name in foreign("tests") if name not in FROM_DEBIAN}
    assert used - declared == set()


def test_no_module_is_two() -> None:
    long = []
    for path in tracked("*.py"):
        place = path.relative_to(CHECKOUT)
        length = len(path.read_text().splitlines())
        if length > (LONGEST_TEST if place.parts[0] == "tests" else LONGEST_MODULE):
            long.append(f"{place}: {length}")
    assert long == []


def test_every_module_says_what_it_is_for() -> None:
    silent = []
    for path in tracked("*.py"):
        text = path.read_text()
        if text.strip() and not ast.get_docstring(ast.parse(text)):
            silent.append(str(path.relative_to(CHECKOUT)))
    assert silent == []


def hosts_of_this_machine() -> set[str]:
    """Where this machine gets its packages from, by its own settings."""
    texts = [
        os.environ.get(name, "")
        for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "GOPROXY", "UV_INDEX_URL")
    ]
    for place in (
        "/etc/apt/sources.list",
        "/etc/pip.conf",
        "/root/.config/pip/pip.conf",
        "/root/.config/go/env",
    ):
        if os.access(place, os.R_OK):
            texts.append(Path(place).read_text())
    texts += [path.read_text() for path in Path("/etc/apt/sources.list.d").glob("*") if path.is_file()]
    return {host for text in texts for host in re.findall(r"https?://(?:[^/@\s]*@)?([\w.-]+\.[a-z]+)", text)}


def well_known_hosts() -> set[str]:
    """Spelt in halves, so that this file passes its own test."""
    halves = {
        "deb": "debian.org",
        "security": "debian.org",
        "ftp": "debian.org",
        "pypi": "org",
        "files": "pythonhosted.org",
        "proxy": "golang.org",
        "sum": "golang.org",
    }
    return {f"{left}.{right}" for left, right in halves.items()}


def test_no_package_host_is_written_down() -> None:
    """Packages come from wherever the machine's owner says: apt's, pip's and Go's own settings."""
    hosts = re.compile("|".join(map(re.escape, sorted(hosts_of_this_machine() | well_known_hosts()))))
    said = []
    for path in tracked():
        for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), 1):
            if hosts.search(line):
                said.append(f"{path.relative_to(CHECKOUT)}:{number}: {line.strip()[:100]}")
    assert said == []


def test_ci_can_be_run() -> None:
    assert os.access(CHECKOUT / ".ci/run", os.X_OK)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):.*## ", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(["make", "-s", "help"], cwd=CHECKOUT, capture_output=True, text=True, check=True)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[1] for line in listed.stdout.splitlines()} == set(phony.split()) == make_targets()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_a_page_tells_to_type_exists(page: str) -> None:
    text = (CHECKOUT / page).read_text()
    code = re.findall(r"`[^`\n]+`|^    .*$", text, re.MULTILINE)
    told = {target for piece in code for target in re.findall(r"\bmake ([a-z-]+)", piece)}
    assert told
    assert told - make_targets() == set()


def test_a_page_links_to_what_exists() -> None:
    missing = []
    for page in tracked("*.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(CHECKOUT)}: {target}")
    assert missing == []


def test_readme_is_two_screens() -> None:
    lines = (CHECKOUT / "README.md").read_text().splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 120


def test_each_directory_of_the_environment_is_spelt_in_one_place() -> None:
    """Who spells one again reads another directory as soon as one of them changes."""
    spelt: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in tracked(f"{package}/*.py"):
            for name in re.findall(r"[\"'](CASEMATE_\w+_DIR)[\"']", path.read_text()):
                spelt.setdefault(name, set()).add(str(path.relative_to(CHECKOUT)))
    assert "CASEMATE_RUN_DIR" in spelt
    assert [name for name, places in spelt.items() if len(places) > 1] == []


def test_the_page_of_clients_is_of_these_tests() -> None:
    assert clients.PAGE.read_text() == clients.page(), "python -m tests.clients"
