"""Pages say what the samples say, refuse what may not be compared, and need nothing from elsewhere."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import document, measures, page, report, svg
from bench.document import Document, Failure, ProcessShare
from rpc.errors import NotFound
from shim.trace import Span
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


@pytest.fixture
def two_machines() -> list[Document]:
    """Of each machine a restored start, of one an exec, too."""
    slow = runs.samples(measures.RUN, {"runc": [0.1] * 3, "casemate": [0.9] * 3}, "restore")
    fast = runs.samples(measures.RUN, {"runc": [1.0] * 3, "casemate": [1.4] * 3}, "restore")
    execs = runs.samples(measures.EXEC, {"runc": [1.0] * 3, "casemate": [1.1] * 3}, "restore")
    return [
        runs.document("boot", slow, source="restore", machine="host"),
        runs.document("exec", execs, accel="kvm", source="restore", machine="test bed"),
        runs.document("boot", fast, accel="kvm", source="restore", machine="test bed"),
    ]


def test_targets_of_two_machines_stand_in_one_table_and_each_is_judged_alone(
    two_machines: list[Document],
) -> None:
    found = page.sections(two_machines)[0].parts[0]
    assert isinstance(found, page.Table)
    assert found.head[3:] == ("host (TCG)", "test bed (KVM)")
    rows = {row[0]: row[1:] for row in found.rows}
    command, limits, host, bed = rows["`ctr run` of `true`, the machine restored"]
    assert command == "`casemate bench boot`"
    assert limits == "at most 1.5 x runc (KVM), 6 x runc (TCG)"
    assert host == "9.00 x runc (9.00 to 9.00), **missed**"
    assert bed == "1.40 x runc (1.40 to 1.40), reached"
    command, _, host, bed = rows["`ctr task exec` of `true`"]
    assert command == "`casemate bench exec`"
    assert host == "not measured: no run of `casemate bench exec`"
    assert bed == "1.10 x runc (1.10 to 1.10), reached"


def test_each_machine_has_a_part_of_the_page_with_its_own_facts(two_machines: list[Document]) -> None:
    text = report.markdown(page.sections(two_machines), "performance")
    titles = re.findall(r"^#{2,} .*$", text, re.MULTILINE)
    assert titles == [
        *("## Targets", "## Host (TCG)", "### Start"),
        *("## Test bed (KVM)", "### Start", "### Exec"),
    ]
    _, host, bed = re.split(r"^## (?:Host|Test bed) .*$", text, flags=re.MULTILINE)
    assert ("ran under TCG" in host, "ran under KVM" in host) == (True, False)
    assert ("ran under TCG" in bed, "ran under KVM" in bed) == (False, True)


def test_a_section_begins_with_the_command_that_measures_the_same() -> None:
    options = {
        "runtimes": ["runc", "casemate"],
        "rounds": 2,
        "pods": 10,
        "settle_s": 5.0,
        "parallel": 1,
        "crowd": 32,
        "crowds": 2,
        "size_bytes": 64 << 20,
    }
    one = runs.document("density", runs.samples(measures.PSS, {"runc": [1.0] * 2}), options=options)
    said = (
        "casemate bench density --runtime runc --runtime casemate --rounds 2 "
        "--parallel 32 --pods 10 --settle 5 --size 64"
    )
    assert one.command == said
    assert page.sections([one])[2].parts[0] == f"`{said}`"


def test_a_page_is_made_again_of_what_is_kept_beside_it(two_machines: list[Document], tmp_path: Path) -> None:
    kept = tmp_path / "performance.md"
    with pytest.raises(NotFound):
        report.renew(kept)
    for one in two_machines:
        place = tmp_path / "performance" / one.machine.replace(" ", "-")
        place.mkdir(parents=True, exist_ok=True)
        document.write(one, place / f"{one.kind}.json")
    written = report.renew(kept)
    assert {path.name for path in written} >= {"performance.md", "report.html", "exec.svg"}
    assert (tmp_path / "performance/host/boot.svg") in written
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", kept.read_text())
    assert sorted(linked) == [
        *("performance/host/boot.svg", "performance/test-bed/boot.svg", "performance/test-bed/exec.svg"),
    ]
    assert all((tmp_path / name).exists() for name in linked)
    (tmp_path / "performance/host/boot.json").unlink()
    report.renew(kept)
    assert not (tmp_path / "performance/host/boot.svg").exists()


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


def test_phases_of_ways_stand_side_by_side_in_the_order_in_which_they_begin() -> None:
    def life(way: str, *spans: tuple[str, str | None, float, float]) -> document.Life:
        found = tuple(Span(name, 50 + start, 50 + end, parent=parent) for name, parent, start, end in spans)
        return document.Life(way, 0, 50.0, 51.0, 51.5, found)

    table = page.phases_table(
        [
            document.Life("runc", 0, 0.0, 1.0, 1.0),
            life(
                "boot", ("ready", None, 0.1, 0.9), ("kernel", "ready", 0.1, 0.6), ("drain", None, 0.9, 0.95)
            ),
            life(
                "restore",
                ("ready", None, 0.1, 0.3),
                ("load", "ready", 0.15, 0.2),
                ("load", "ready", 0.25, 0.3),
            ),
        ]
    )
    assert table.head == ("", "boot", "restore")
    assert table.rows == (
        ("ready", "800", "200"),
        ("· kernel", "500", ""),
        ("· load", "", "100"),
        ("drain", "50", ""),
        ("ctr, from exec to exit", "1000", "1000"),
    )


@given(st.floats(1e-6, 1e6))
def test_an_axis_has_a_few_round_ticks(most: float) -> None:
    found = svg.ticks(most)
    assert found[0] == 0
    assert 4 <= len(found) <= 11
    assert found[-1] <= most * 1.000001


def files_of(way: str, differences: tuple[str, ...] = ()) -> document.Trials:
    return document.Trials(way, 18, differences)


def test_ways_to_give_a_container_its_files_stand_side_by_side() -> None:
    """Of each what was measured in the newest run of its kind: start, memory, files; and what was not so."""
    walked = runs.samples(measures.FILES_WALK, {"runc": [0.5] * 3, "casemate": [2.0] * 3})
    read = runs.samples(measures.FILES_READ, {"runc": [2e9] * 3, "casemate": [1e8] * 3})
    files = runs.document("files", [*walked, *read])
    ways = (files.ways[0], replace(files.ways[1], files=("9p",)))
    trials = (files_of("runc"), files_of("casemate", (f"times_hold: {HOSTILE}",)))
    files = replace(files, ways=ways, trials=trials)
    started = runs.samples(measures.RUN, {"runc": [0.1] * 3, "casemate": [0.4] * 3})
    older = runs.samples(measures.RUN, {"runc": [9.0] * 3, "casemate": [9.0] * 3})
    boots = [replace(runs.document("boot", older), began_at=1.0), runs.document("boot", started)]

    title, about, table = next(
        (section.title, *section.parts)
        for section in page.sections([files, *boots])
        if "compare" in section.title
    )
    assert title == "How the root-file-system ways compare"
    assert "docs/architecture.md" in str(about)
    assert isinstance(table, page.Table)
    assert table.head == ("", "runc", "casemate")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["files by"] == ("-", "9p")
    assert rows["`ctr run --rm` of `true`, from ctr's exec to its exit (s)"] == (
        "0.100",
        "0.400, x 4.00 (4.00 to 4.00)",
    )
    assert rows["lstat of everything below /usr, the first time (s)"][1].startswith("2.000, x 4.00")
    assert rows["PSS of an idle pod's processes, the share of one of all (MiB)"] == ("-", "-")
    assert rows["expected by programs, and not so"] == ("0 of 18", "1 of 18")

    text = report.markdown(page.sections([files]), "performance")
    assert "| casemate | 18 | `times_hold: kernel</text><script>" in text
    assert "\x1b" not in text
    assert "<script" not in report.html([files])


def test_measures_of_two_units_are_drawn_on_two_axes() -> None:
    walked = runs.samples(measures.FILES_WALK, {"runc": [0.5] * 3})
    read = runs.samples(measures.FILES_READ, {"runc": [2e9] * 3})
    parts = page.sections([runs.document("files", [*walked, *read])])[2].parts
    pictures = [part for part in parts if isinstance(part, page.Picture)]
    assert [picture.name for picture in pictures] == ["files", "files-MiB-s"]


def test_without_a_look_at_root_file_systems_nothing_is_compared(documents: list[Document]) -> None:
    assert page.files_compared(documents) == ()
