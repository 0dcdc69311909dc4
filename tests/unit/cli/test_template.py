"""`casemate template` and what `casemate gc` does with templates, on a store made by code."""

import json
import os
import sys
from pathlib import Path

import pytest

from config.load import load
from config.settings import Profile, Settings
from images.image import GuestImage
from images.store import ImageStore
from shim import apprentice
from shim.paths import PodPaths
from shim.vm.template import MANIFEST, Template, TemplateStore
from shim.vm.versions import identity
from tests.unit.cli.conftest import Casemate
from tests.unit.images.fakes import add_image
from tests.unit.shim.templates import key, make

MIB = 1 << 20
FAILURE, NOT_FOUND = 1, 3


@pytest.fixture
def store(host: Path) -> TemplateStore:
    return TemplateStore(host / "templates", host / "run/cache/templates")


def template(store: TemplateStore, number: int, **about: object) -> Template:
    known = {
        "image": "sha256:" + "ab" * 32,
        "profile": "default",
        "tenant": "",
        "accel": "tcg",
        "qemu": "qemu 1 2 3",
        "kernel": "6.1",
        "vcpus": 2,
        "memory_bytes": 256 * MIB,
        "ram_bytes": 50 * MIB,
        "files": "virtiofs",
        "created_at": 1_700_000_000.0,
    }
    made = make(store, key(number), **(known | about))
    used = 1_700_000_000 + number % 1000
    os.utime(made.directory, (used, used))
    return made


# -- list, show, rm ------------------------------------------------------------------------------------------


def test_a_store_that_is_empty_is_listed(casemate: Casemate) -> None:
    assert json.loads(casemate("template", "list", "--json").stdout) == []
    assert casemate("template", "list").stdout.split()[0] == "KEY"


def test_templates_are_listed_with_their_shape(casemate: Casemate, store: TemplateStore) -> None:
    template(store, 1)
    template(store, 2, tenant="blue", profile="small")
    _, first, second = casemate("template", "list").stdout.splitlines()
    assert first.split()[:8] == [key(2)[:12], "small", "blue", "2", "256", "MiB", "50", "MiB"]
    assert second.split()[:3] == [key(1)[:12], "default", "all"]
    listed = json.loads(casemate("template", "list", "--json").stdout)
    assert [entry["key"] for entry in listed] == [key(2), key(1)]
    assert listed[1]["memory_bytes"] == 256 * MIB
    assert listed[1]["directory"] == str(store.root / key(1))
    assert listed[1]["used_at"] == 1_700_000_001


def test_a_template_is_shown_by_any_beginning_of_its_key(casemate: Casemate, store: TemplateStore) -> None:
    template(store, 0xABC << 100)
    template(store, 0xABD << 100)
    whole = key(0xABC << 100)
    shown = json.loads(casemate("template", "show", whole[:7], "--json").stdout)
    assert shown["key"] == whole
    assert shown["kernel"] == "6.1"
    assert len(shown["sha256"]["ram"]) == 64
    assert f"key           {whole}" in casemate("template", "show", whole).stdout
    ambiguous = casemate("template", "show", whole[:6])
    assert ambiguous.exit_code == FAILURE
    assert "is ambiguous" in ambiguous.stderr
    assert key(0xABD << 100) in ambiguous.stderr


@pytest.mark.parametrize("command", ["show", "rm"])
@pytest.mark.parametrize("word", ["", "7", "nothing", "../templates", "tmp"])
def test_what_is_not_there_is_not_found(
    casemate: Casemate, store: TemplateStore, command: str, word: str
) -> None:
    template(store, 1)
    done = casemate("template", command, word)
    assert done.exit_code == NOT_FOUND
    assert "casemate template list" in done.stderr
    assert store.keys() == (key(1),)


def test_templates_are_removed_all_or_none(casemate: Casemate, store: TemplateStore) -> None:
    for number in (1, 2, 3):
        template(store, number)
    assert casemate("template", "rm", key(1), "nothing").exit_code == NOT_FOUND
    assert len(store.keys()) == 3
    assert casemate("template", "rm", key(1)).stdout == f"removed {key(1)}\n"
    done = casemate("template", "rm", key(2), key(3), "--json")
    assert json.loads(done.stdout) == {"removed": [key(2), key(3)]}
    assert store.keys() == ()


def test_one_that_cannot_be_read_is_told_and_can_be_removed(casemate: Casemate, store: TemplateStore) -> None:
    (template(store, 1).directory / MANIFEST).write_text("{")
    shown = casemate("template", "show", key(1))
    assert shown.exit_code != 0
    assert "manifest.json cannot be read" in shown.stderr
    assert casemate("template", "rm", key(1)[:31]).exit_code == 0
    assert store.keys() == ()


# -- build ---------------------------------------------------------------------------------------------------


class Maker:
    """Stands for the process that boots a machine: what it was asked, and how it ends."""

    def __init__(self, store: TemplateStore) -> None:
        self.store = store
        self.asked: list[tuple[str, str, str]] = []
        self.auto = "virtiofs"
        self.status = 0
        self.log = ""

    def __call__(self, settings: Settings, profile: Profile, tenant: str) -> tuple[int, PodPaths]:
        self.asked.append((profile.name, tenant, profile.files))
        paths = PodPaths(apprentice.NAMESPACE, "x")
        if self.log:
            paths.ended.mkdir(parents=True)
            (paths.ended / "shim.log").write_text(self.log)
        files = self.auto if profile.files == "auto" else profile.files
        number = 1 if files == "virtiofs" else 2
        stored = self.store.keys()
        if not self.status and key(number) not in stored:
            template(self.store, number, profile=profile.name, tenant=tenant, files=files)
        return self.status, paths


@pytest.fixture
def maker(store: TemplateStore, monkeypatch: pytest.MonkeyPatch) -> Maker:
    maker = Maker(store)
    monkeypatch.setattr(apprentice, "make", maker)
    return maker


def test_a_template_is_made_ahead_once(casemate: Casemate, maker: Maker) -> None:
    done = casemate("template", "build")
    assert done.stdout == f"template {key(1)}, 50 MiB of RAM saved\n"
    assert "profile default" in done.stderr
    again = casemate("template", "build")
    assert again.exit_code == 0
    assert "there already" in again.stdout
    assert maker.asked == [("default", "", files) for files in ("auto", "auto", "virtiofs")]


def test_of_the_profile_that_is_named(casemate: Casemate, maker: Maker) -> None:
    (made,) = json.loads(casemate("template", "build", "--profile", "small", "--json").stdout)["made"]
    assert (made["key"], made["profile"]) == (key(1), "small")
    assert json.loads(casemate("template", "build", "--json").stdout) == {"made": []}
    assert maker.asked[0] == ("small", "", "auto")
    assert maker.asked[1:] == [("default", "", "auto"), ("default", "", "virtiofs")]


def test_a_maker_that_failed_is_quoted(casemate: Casemate, maker: Maker) -> None:
    maker.status, maker.log = 1, "".join(f"line {number}\n" for number in range(20))
    done = casemate("template", "build")
    assert done.exit_code == FAILURE
    assert done.stdout == ""
    assert "the template could not be made" in done.stderr
    assert "line 19" in done.stderr
    assert "line 11" not in done.stderr


def test_a_maker_that_left_no_word_failed_all_the_same(casemate: Casemate, maker: Maker) -> None:
    maker.status = 9
    done = casemate("template", "build")
    assert done.exit_code == FAILURE
    assert "the template could not be made" in done.stderr


PROFILES = """\
[profiles.apart]
template = "tenant"
[profiles.never]
template = "off"
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--profile", "nothing"), "no profile nothing"),
        (("--profile", "never"), 'template = "off"'),
        (("--profile", "apart"), "--tenant goes with"),
        (("--tenant", "blue"), "--tenant goes with"),
    ],
)
def test_what_no_pod_would_use_is_refused(
    casemate: Casemate, host: Path, maker: Maker, words: tuple[str, ...], said: str
) -> None:
    (host / "etc/config.toml").write_text(PROFILES)
    done = casemate("template", "build", *words)
    assert done.exit_code != 0
    assert said in done.stderr
    assert maker.asked == []


def test_a_tenants_template_is_made_for_it(casemate: Casemate, host: Path, maker: Maker) -> None:
    (host / "etc/config.toml").write_text(PROFILES)
    assert casemate("template", "build", "--profile", "apart", "--tenant", "blue").exit_code == 0
    assert maker.asked == [("apart", "blue", "auto")]


def test_where_files_may_come_two_ways_there_is_a_template_of_each(casemate: Casemate, maker: Maker) -> None:
    maker.auto = "9p"
    done = casemate("template", "build", "--json")
    assert sorted(made["key"] for made in json.loads(done.stdout)["made"]) == [key(1), key(2)]
    assert [files for _, _, files in maker.asked] == ["auto", "virtiofs"]


def test_of_the_way_that_a_profile_decides_there_is_one(casemate: Casemate, host: Path, maker: Maker) -> None:
    (host / "etc/config.toml").write_text('[profiles.default]\nfiles = "9p"\n')
    assert casemate("template", "build").exit_code == 0
    assert maker.asked == [("default", "", "9p")]


# -- gc ------------------------------------------------------------------------------------------------------


@pytest.fixture
def image(host: Path) -> GuestImage:
    return add_image(ImageStore(host / "images"), host)


def test_templates_that_no_pod_can_use_are_collected(
    casemate: Casemate, host: Path, store: TemplateStore, image: GuestImage
) -> None:
    qemu = sys.executable
    (host / "etc/config.toml").write_text(f'qemu = "{qemu}"\ntemplates_kept = 2\n')
    good = {"image": image.digest, "qemu": identity(qemu)}
    for number in (1, 2, 3):
        template(store, number, **good)
    template(store, 4, **(good | {"image": "sha256:gone"}))
    template(store, 5, **(good | {"qemu": "replaced"}))
    (template(store, 6, **good).directory / MANIFEST).write_text("{")
    doomed = sorted([key(1), key(4), key(5), key(6)])
    assert sorted(json.loads(casemate("gc", "-n", "--json").stdout)["templates"]) == doomed
    assert "would remove 4 templates" in casemate("gc", "--dry-run").stdout
    assert len(store.keys()) == 6
    assert "removed 4 templates" in casemate("gc").stdout
    assert sorted(store.keys()) == [key(2), key(3)]
    assert json.loads(casemate("gc", "--json").stdout)["templates"] == []


def test_templates_of_a_qemu_that_is_gone_are_collected(
    casemate: Casemate, host: Path, store: TemplateStore, image: GuestImage
) -> None:
    (host / "etc/config.toml").write_text('qemu = "/no/such/qemu"\n')
    template(store, 1, image=image.digest)
    assert json.loads(casemate("gc", "--json").stdout)["templates"] == [key(1)]


def test_templates_where_others_may_write_are_left_alone_and_told_of(
    casemate: Casemate, host: Path, store: TemplateStore
) -> None:
    template(store, 1)
    store.root.chmod(0o777)
    result = casemate("gc", "--json")
    assert result.exit_code == 1
    (failure,) = json.loads(result.stdout)["failed"]
    assert f"others than root can write to {store.root}" in failure["templates"]
    assert f"others than root can write to {store.root}" in casemate("gc").stderr
    assert store.keys() == (key(1),)


def test_a_mistake_in_the_config_keeps_templates(
    casemate: Casemate, host: Path, store: TemplateStore
) -> None:
    template(store, 1)
    (host / "etc/config.toml").write_text("no_such_key = 1\n")
    assert casemate("gc").exit_code == 1
    assert store.keys() == (key(1),)


def test_settings_say_where_templates_are(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (host / "etc/config.toml").write_text('template_dir = "/a/b"\n')
    assert load().template_dir == str(host / "templates")  # the environment goes first
    monkeypatch.delenv("CASEMATE_TEMPLATE_DIR")
    assert load().template_dir == "/a/b"
