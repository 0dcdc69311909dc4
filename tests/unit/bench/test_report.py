"""Pages say what the samples say, refuse what may not be compared, and need nothing from elsewhere."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import measures, page, report, svg
from bench.document import Document, Failure, ProcessShare
from tests.unit.bench import runs

HOSTILE = "kernel</text><script>alert(1)</script>\x1b[31m"


@pytest.fixture
def documents() -> list[Document]:
    found = runs.samples(measures.RUN, {"runc": [0.1, 0.2, 0.3], "casemate": [2.0, 2.0, 2.5]}, "boot")
    boot = runs.document("boot", found, lives=[runs.life("runc"), runs.life("casemate", "boot", HOSTILE)])
    weighed = runs.samples(measures.PSS, {"runc": [8e6, 8e6], "casemate": [9e7, 9e7]}, "boot")
    shares = (ProcessShare("runc", "sleep", 8e6, 0), ProcessShare("casemate", "qemu", 9e7, 5e7))
    density = runs.document("density", weighed, options={"pods": 10, "settle_s": 5.0})
    return [replace(density, processes=shares), boot]


def test_a_ratio_stands_with_its_interval(documents: list[Document]) -> None:
    row = next(row for row in page.table(documents[1]).rows if row[1] == "casemate")
    assert row[2:6] == ("2.000", "2.450", "2.490", "2.000 to 2.500")
    assert re.fullmatch(r"10\.00 \(\d+\.\d\d to \d+\.\d\d\)", row[6])


def test_the_refusal_stands_in_the_place_of_a_ratio() -> None:
    found = runs.samples(measures.RUN, {"runc": [0.1, 0.2]}) + runs.samples(
        measures.RUN, {"casemate": [1.0, 1.0]}
    )
    text = report.markdown(page.sections([runs.document("boot", found)]), "performance")
    assert "refused: their turns do not alternate in round 0" in text
    assert "10.00" not in text


def test_a_page_says_what_accelerated_the_guests(documents: list[Document]) -> None:
    assert "**The guests ran under TCG**" in report.markdown(page.sections(documents), "performance")
    kvm = replace(documents[1], ways=(documents[1].ways[0], replace(documents[1].ways[1], accel="kvm")))
    assert "The guests ran under KVM" in report.markdown(page.sections([kvm]), "performance")


def test_a_page_and_its_pictures_are_written_side_by_side(documents: list[Document], tmp_path: Path) -> None:
    own = tmp_path / "performance" / "logo.svg"
    own.parent.mkdir()
    own.write_text("<svg/>")
    before = report.write_page(documents, tmp_path / "performance.md")
    assert own.exists()
    text = (tmp_path / "performance.md").read_text()
    linked = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", text))
    assert linked == {str(path.relative_to(tmp_path)) for path in before[1:]}
    assert {"performance/boot.svg", "performance/density-processes.svg"} <= linked
    assert "performance/boot-waterfall-casemate.svg" in linked
    report.write_page(documents[:1], tmp_path / "performance.md")
    assert not (tmp_path / "performance/boot.svg").exists()
    assert own.exists()


def test_every_picture_is_well_formed_and_as_harmless_as_its_data(
    documents: list[Document], tmp_path: Path
) -> None:
    for path in report.write_page(documents, tmp_path / "performance.md")[1:]:
        root = ElementTree.parse(path).getroot()  # noqa: S314 - we wrote it
        kinds = {element.tag.removeprefix(f"{{{svg.NAMESPACE}}}") for element in root.iter()}
        assert kinds <= {"svg", "title", "rect", "line", "circle", "text"}
    waterfall = (tmp_path / "performance/boot-waterfall-casemate.svg").read_text()
    assert "&lt;script&gt;" in waterfall
    assert "\x1b" not in waterfall


def test_the_html_needs_no_other_file(documents: list[Document]) -> None:
    text = report.html(documents)
    assert text.count("<svg") == 5
    assert "<script" not in text
    assert not re.search(r"""(src|href)=|url\(|@import""", text)
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {svg.NAMESPACE}


def test_waterfalls_stand_side_by_side_on_one_scale(documents: list[Document]) -> None:
    rows = [part for s in page.sections(documents) for part in s.parts if isinstance(part, page.Row)]
    (row,) = rows
    assert [picture.name for picture in row.pictures] == ["boot-waterfall-runc", "boot-waterfall-casemate"]
    axes = [set(re.findall(r'fill="#6b7280">([0-9.]+)<', picture.content)) for picture in row.pictures]
    assert axes[0] == axes[1]


def test_those_that_failed_stand_beside_the_numbers(documents: list[Document]) -> None:
    failed = (Failure("casemate", 1, f"ctr: `no` | room\n{HOSTILE}"),)
    text = report.markdown(page.sections([replace(documents[1], failures=failed)]), "performance")
    assert "**1 of those that started at once failed**" in text
    assert "| casemate | 1 | `ctr: 'no' \\| room" in text
    assert "\x1b" not in text


@given(st.floats(1e-6, 1e6))
def test_an_axis_has_a_few_round_ticks(most: float) -> None:
    found = svg.ticks(most)
    assert found[0] == 0
    assert 4 <= len(found) <= 11
    assert found[-1] <= most * 1.000001
