"""Targets are reached, missed or not measured, and which of them it is follows from the samples alone."""

import pytest

from bench import measures, targets
from bench.document import Document
from bench.targets import Verdict
from tests.unit.bench import runs


def verdicts(*documents: Document) -> dict[str, targets.Judged]:
    return {one.target.name: one for one in targets.judge(documents)}


def boot(seconds: float, source: str, accel: str = "tcg", memory_bytes: int = 256 << 20) -> Document:
    values = {"runc": [0.1, 0.1, 0.1], "casemate": [seconds] * 3}
    found = runs.samples(measures.RUN, values, source)
    return runs.document("boot", found, accel=accel, source=source, memory_bytes=memory_bytes)


def test_without_runs_nothing_is_measured() -> None:
    assert {one.verdict for one in targets.judge([])} == {Verdict.NOT_MEASURED}


@pytest.mark.parametrize(
    ("accel", "seconds", "verdict"),
    [
        ("kvm", 0.149, Verdict.REACHED),
        ("kvm", 0.151, Verdict.MISSED),
        ("tcg", 0.59, Verdict.REACHED),
        ("tcg", 0.61, Verdict.MISSED),
    ],
)
def test_a_restored_start_against_runc(accel: str, seconds: float, verdict: Verdict) -> None:
    assert verdicts(boot(seconds, "restore", accel))["start.restored"].verdict is verdict


def test_a_machine_that_was_booted_says_nothing_about_restoring() -> None:
    judged = verdicts(boot(0.1, "boot"))
    assert judged["start.restored"].verdict is Verdict.NOT_MEASURED
    assert judged["start.pooled"].verdict is Verdict.NOT_MEASURED
    # and under TCG nothing is promised of a boot
    assert judged["start.booted"].verdict is Verdict.NONE


def test_half_of_kata_is_for_machines_that_boot_with_kvm() -> None:
    assert verdicts(boot(0.51, "boot", "kvm"))["start.booted"].verdict is Verdict.REACHED
    assert verdicts(boot(0.52, "boot", "kvm"))["start.booted"].verdict is Verdict.MISSED


def test_a_shim_of_casemateds_is_judged_and_its_starts_are_not_those_without_a_daemon() -> None:
    from dataclasses import replace

    def beside(document: Document) -> Document:
        runc, casemate = document.ways
        return replace(document, ways=(runc, replace(casemate, casemated=True)))

    shims = runs.samples(measures.PSS_SHIM, {"casemate": [11.0 * measures.MIB] * 3}, "restore")
    without = runs.document("density", shims, source="restore")
    assert verdicts(without)["pss.shim"].verdict is Verdict.NOT_MEASURED
    assert verdicts(beside(without))["pss.shim"].verdict is Verdict.REACHED
    assert verdicts(beside(boot(0.1, "restore")))["start.restored"].verdict is Verdict.NOT_MEASURED


def test_a_mixture_of_sources_is_no_restored_start() -> None:
    found = list(boot(0.1, "restore").samples)
    found[-1] = boot(0.1, "boot").samples[-1]
    assert verdicts(runs.document("boot", found))["start.restored"].verdict is Verdict.NOT_MEASURED


def test_guests_of_another_size_are_not_judged() -> None:
    judged = verdicts(boot(0.1, "restore", memory_bytes=128 << 20))["start.restored"]
    assert judged.verdict is Verdict.NOT_MEASURED
    assert "128 MiB" in judged.reason


def test_a_ratio_of_runs_that_were_not_interleaved_is_no_answer() -> None:
    found = runs.samples(measures.EXEC, {"runc": [1.0, 1.0]})
    found += runs.samples(measures.EXEC, {"casemate": [1.0, 1.0]})
    judged = verdicts(runs.document("exec", found))["exec"]
    assert judged.verdict is Verdict.NOT_MEASURED
    assert "not interleaved" in judged.reason


def test_two_files_are_never_compared() -> None:
    """runc in one run, casemate in another: there is no ratio, whatever the numbers are."""
    ours = runs.document("exec", runs.samples(measures.EXEC, {"casemate": [1.0, 1.0]}))
    theirs = runs.document("exec", runs.samples(measures.EXEC, {"runc": [1.0, 1.0]}))
    assert verdicts(ours, theirs)["exec"].verdict is Verdict.NOT_MEASURED


@pytest.mark.parametrize(
    ("pods", "mib", "verdict"),
    [(10, 44.0, Verdict.REACHED), (10, 46.0, Verdict.MISSED), (9, 44.0, Verdict.NOT_MEASURED)],
)
def test_idle_pods_are_weighed_ten_at_once(pods: int, mib: float, verdict: Verdict) -> None:
    found = runs.samples(measures.PSS, {"runc": [1.0, 1.0], "casemate": [mib * measures.MIB] * 2})
    one = runs.document("density", found, options={"pods": pods, "settle_s": 5.0})
    assert verdicts(one)["pss"].verdict is verdict


def test_seconds_are_judged_by_their_median() -> None:
    found = runs.samples(measures.DELETE, {"runc": [0.1] * 3, "casemate": [0.29, 0.1, 9.0]})
    judged = verdicts(runs.document("delete", found))["delete"]
    assert judged.verdict is Verdict.REACHED
    assert judged.found is not None
    assert judged.found.value == 0.29
