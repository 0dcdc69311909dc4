"""The codes: each with its words, each in docs/gpus.md, and which of them may be waived."""

from pathlib import Path

from config.waivers import WAIVABLE
from vfio.findings import RULES, Code, Severity, table

PAGE = Path(__file__).parents[3] / "docs/gpus.md"


def test_every_code_has_its_words() -> None:
    assert set(RULES) == set(Code)
    for rule in RULES.values():
        assert rule.means.endswith(".")
        assert rule.fix


def test_the_page_has_the_table_of_the_code() -> None:
    assert table() in PAGE.read_text(), f"put this into {PAGE}:\n{table()}"


def test_only_what_refuses_can_be_waived() -> None:
    codes = {code.value: code for code in Code}
    assert set(WAIVABLE) <= set(codes)
    assert {RULES[codes[name]].severity for name in WAIVABLE} == {Severity.REFUSED}


def test_the_hosts_own_data_and_what_the_kernel_refuses_cannot_be_waived() -> None:
    never = {
        "iommu-off",
        "no-group",
        "group-not-viable",
        "root-disk",
        "disk-in-use",
        "open-handles",
        "no-answer",
    }
    assert never & set(WAIVABLE) == set()
