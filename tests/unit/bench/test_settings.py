"""The configuration that is written for a checkout is one that this checkout takes."""

from pathlib import Path

import pytest

from bench import settings
from bench.instance import CHECKOUT
from config.load import load

OLDER = """
qemu = "/usr/bin/qemu-system-x86_64"
image_dir = "/var/lib/casemate/images"
[profiles.default]
image = "default"
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CASEMATE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("CASEMATE_CONFIG_DIR", str(tmp_path / "etc"))
    monkeypatch.delenv("CASEMATE_IMAGE_DIR", raising=False)
    monkeypatch.delenv("CASEMATE_TEMPLATE_DIR", raising=False)
    (tmp_path / "etc").mkdir()
    return tmp_path


def test_what_the_operator_says_of_the_host_is_kept_and_the_rest_is_the_runs(places: Path) -> None:
    config = places / "etc/config.toml"
    config.write_text('qemu = "/opt/qemu"\n[profiles.default]\nvcpus = 8\n[timeouts]\nboot_s = 99.5\n')
    digest = "sha256:" + "0" * 64
    config.write_text(
        settings.written(
            CHECKOUT,
            load(),
            images=Path("/i"),
            templates=Path("/t"),
            image=digest,
            template="off",
            files="virtiofs",
        )
    )
    now = load()
    assert (now.qemu, now.image_dir, now.template_dir) == ("/opt/qemu", "/i", "/t")
    assert now.timeouts.boot_s == 99.5  # of an emulated machine in an emulated machine, say
    default = now.profiles["default"]
    assert (default.image, default.template, default.vcpus) == (digest, "off", 1)
    assert default.files == "virtiofs"


def test_an_older_checkout_is_told_only_what_it_knows(places: Path) -> None:
    (places / "old/config").mkdir(parents=True)
    (places / "old" / settings.DEFAULTS).write_text(OLDER)
    found = settings.written(
        places / "old", load(), images=Path("/i"), templates=Path("/t"), image="default", template="off"
    )
    assert found == (
        'qemu = "/usr/bin/qemu-system-x86_64"\nimage_dir = "/i"\n[profiles.default]\nimage = "default"\n'
    )


def test_which_pods_come_to_be_restored(places: Path) -> None:
    assert settings.restores(CHECKOUT, "")
    assert not settings.restores(CHECKOUT, "off")
    (places / "old/config").mkdir(parents=True)
    (places / "old" / settings.DEFAULTS).write_text(OLDER)
    assert not settings.restores(places / "old", "")
