"""Targets are reached, missed or not measured, and which of them it is follows from the samples alone."""

from dataclasses import replace

import pytest

from bench import measures, targets
from bench.document import Document, Failure
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
    def beside(document: Document) -> Document:
        runc, casemate = document.ways
        return replace(document, ways=(runc, replace(casemate, casemated=True)))

    shims = runs.samples(measures.PSS_SHIM, {"casemate": [11.0 * measures.MIB] * 3}, "restore")
    without = runs.document("density", shims, source="restore")
    assert verdicts(without)["pss.shim"].verdict is Verdict.NOT_MEASURED
    assert verdicts(beside(without))["pss.shim"].verdict is Verdict.REACHED
    assert verdicts(beside(boot(0.1, "restore")))["start.restored"].verdict is Verdict.NOT_MEASURED


def test_a_newer_run_of_fewer_rounds_is_no_answer_where_there_is_one_of_more() -> None:
    """As a crowd's, which is kept beside the starts."""
    fewer = replace(boot(9.0, "restore"), options={"rounds": 2}, began_at=2_000_000_000.0)
    judged = verdicts(boot(2.0, "restore"), fewer)["start.restored"]
    assert judged.found is not None
    assert judged.found.value == pytest.approx(20.0)


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


def crowd(
    many: list[float], *, alone_s: float = 1.0, cpus: int = 4, at_once: int = 32, failed: int = 0
) -> Document:
    """casemate's starts one at a time, then at once."""
    alone = runs.samples(measures.RUN, {"runc": [0.1] * 3, "casemate": [alone_s] * 3}, "restore")
    (first, *_) = runs.samples(measures.MANY_RUN, {"casemate": [0.0]}, "restore")
    found = alone + [replace(first, value=value) for value in many]
    one = runs.document("boot", found, source="restore", options={"crowd": at_once, "crowds": 1})
    failures = tuple(Failure("casemate", 0, "no room") for _ in range(failed))
    return replace(one, host={**one.host, "cpus": cpus}, failures=failures)


@pytest.mark.parametrize(
    ("many_s", "cpus", "verdict"),
    [
        (23.9, 4, Verdict.REACHED),  # 32 / 4 starts take 8 s
        (24.1, 4, Verdict.MISSED),
        (11.9, 8, Verdict.REACHED),
        (2.9, 64, Verdict.REACHED),  # nobody can start sooner than one that is alone
        (3.1, 64, Verdict.MISSED),
    ],
)
def test_many_at_once_may_take_three_times_what_the_processors_would_need(
    many_s: float, cpus: int, verdict: Verdict
) -> None:
    judged = verdicts(crowd([many_s] * 32, cpus=cpus))
    assert judged["crowd.restored"].verdict is verdict
    assert judged["crowd.pooled"].verdict is Verdict.NOT_MEASURED


def test_it_is_the_slow_end_that_counts() -> None:
    assert verdicts(crowd([1.0] * 31 + [99.0]))["crowd.restored"].verdict is Verdict.REACHED
    assert verdicts(crowd([1.0] * 30 + [99.0] * 2))["crowd.restored"].verdict is Verdict.MISSED


def test_one_failure_spoils_it_however_fast_the_others_were() -> None:
    judged = verdicts(crowd([1.0] * 31, failed=1))["crowd.restored"]
    assert judged.verdict is Verdict.MISSED
    assert judged.reason == "1 of 32 failed"


def test_another_number_at_once_is_not_judged() -> None:
    judged = verdicts(crowd([1.0] * 16, at_once=16))["crowd.restored"]
    assert judged.verdict is Verdict.NOT_MEASURED
    assert "--parallel 32" in judged.reason


def test_what_is_at_least_is_not_at_most() -> None:
    (block,) = [target for target in targets.TARGETS if target.name == "read.block"]
    assert block.allows(0.9, block.limits["kvm"])
    assert not block.allows(0.89, block.limits["kvm"])


def test_reading_is_reported_beside_runc_and_a_block_device_has_its_target() -> None:
    values = {"runc": [2000.0 * measures.MIB] * 2, "casemate": [500.0 * measures.MIB] * 2}
    volume = (measures.ROOTFS_WARM, measures.VOLUME_WARM)
    measured = (*volume, measures.TCP_IN, measures.TCP_OUT, measures.BLOCK)
    found = [sample for measure in measured for sample in runs.samples(measure, values)]
    judged = verdicts(runs.document("io", tuple(found)))
    for name in ("read.rootfs", "read.volume", "tcp.in", "tcp.out"):
        read = judged[name].found
        assert judged[name].verdict is Verdict.NONE
        assert read is not None
        assert read.value == 0.25
    assert judged["read.block"].verdict is Verdict.MISSED
    assert judged["output"].verdict is Verdict.NOT_MEASURED
