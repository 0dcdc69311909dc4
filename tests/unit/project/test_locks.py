"""The locks hold what pyproject.toml declares: exact, hashed, the same for product and tests."""

import re
import tomllib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
LOCKS = CHECKOUT / "requirements"


def pins(lock: str) -> dict[str, str]:
    text = (LOCKS / f"{lock}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("lock", "requirements"),
    [
        ("build", PROJECT["build-system"]["requires"]),
        ("product", PROJECT["project"]["dependencies"]),
        ("dev", PROJECT["project"]["dependencies"]),
        ("dev", PROJECT["project"]["optional-dependencies"]["dev"]),
    ],
)
def test_every_requirement_is_locked(lock: str, requirements: list[str]) -> None:
    locked = pins(lock)
    for requirement in requirements:
        name, exact, version = requirement.partition("==")
        assert re.split(r"[<>=]", name)[0] in locked, requirement
        if exact:
            assert locked[name] == version


def test_what_is_tested_is_what_is_shipped() -> None:
    product, dev = pins("product"), pins("dev")
    assert product.items() <= dev.items()


@pytest.mark.parametrize("lock", ["build", "product", "dev"])
def test_every_pin_has_a_hash_and_nothing_names_an_index(lock: str) -> None:
    text = (LOCKS / f"{lock}.txt").read_text()
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert blocks
    for block in blocks:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]
    assert "://" not in text
    assert "--index" not in text
