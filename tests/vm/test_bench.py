"""A small run of `casemate bench`, end to end: real runtimes in turns, files, a report, no remains."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import document, floor, measures, stats, suite, targets
from bench.instance import CHECKOUT
from tests.vm import builds
from tests.vm.operator import casemate
from tests.vm.pods import FULL, Pods

Bench = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def bench(demo_archive: Path, image_store: Path) -> Bench:
    """The command in a process of its own, as a user has it, on the containerd of the tests."""
    environment = {**os.environ, "CASEMATE_IMAGE_DIR": str(image_store)}
    places = ["--containerd", str(builds.provide(FULL).directory), "--archive", str(demo_archive)]

    def run(kind: str, *words: str) -> subprocess.CompletedProcess[str]:
        argv = [
            sys.executable,
            "-m",
            "cli.main",
            "bench",
            kind,
            *words,
            *(places if kind != "report" else []),
        ]
        return subprocess.run(
            argv, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False
        )

    return run


def scratch() -> set[Path]:
    return set(Path("/var/tmp").glob("casemate-bench-*"))


@pytest.mark.timeout(600)
def test_runtimes_in_turns_and_a_report_of_them(bench: Bench, tmp_path: Path) -> None:
    before = scratch()
    kept = tmp_path / "boot.json"
    words = ("--runtime", "runc", "--runtime", "again=runc", "--runtime", "casemate", "--rounds", "2")
    done = bench("boot", *words, "--parallel", "3", "--output", str(kept), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(kept.read_text())
    assert scratch() - before == set()

    found = document.read(kept)
    runs = [sample for sample in found.samples if sample.measure == measures.RUN]
    assert [(sample.turn, sample.way) for sample in runs] == list(
        enumerate(["runc", "again", "casemate"] * 2)
    )
    for way in ("runc", "again", "casemate"):
        whole, left = found.values(way, measures.RUN), found.values(way, measures.RUN_GONE)
        assert all(0 < run <= gone for run, gone in zip(whole, left, strict=True))
        many = found.values(way, measures.MANY_RUN)
        assert len(many) == len(found.values(way, measures.MANY_FIRST_BYTE)) == 6
        assert max(found.values(way, measures.MANY_GONE)) >= max(many)
    assert found.failures == ()
    casemate = found.ways[2]
    assert casemate.accel in ("kvm", "tcg")
    assert (casemate.vcpus, casemate.memory_bytes) == (1, 256 * measures.MIB)
    assert found.sources("casemate", measures.RUN) <= {"boot", "restore", "pool"}
    lives = {life.way: life for life in found.lives}
    assert lives["casemate"].exec_s < min(span.start_s for span in lives["casemate"].spans)
    assert lives["runc"].spans == ()

    done = bench("report", str(kept), "--page", str(tmp_path / "p.md"), "--html", str(tmp_path / "p.html"))
    assert done.returncode == 0, done.stderr
    assert "guest power-on to the agent's answer" in done.stdout
    assert f"The guests ran under {casemate.accel.upper()}" in (tmp_path / "p.md").read_text()
    assert (tmp_path / "p.html").read_text().count("<svg") == 4


@pytest.mark.timeout(900)
def test_everything_else_that_is_measured(
    demo_archive: Path, image_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """exec by three clients at once, the end of containers, idle pods, reading: on one stand."""
    monkeypatch.setenv("CASEMATE_IMAGE_DIR", str(image_store))
    options = suite.Options(
        ways=("runc", "casemate"),
        rounds=2,
        parallel=3,
        pods=2,
        settle_s=0.5,
        size_bytes=4 * measures.MIB,
        containerd=builds.provide(FULL).directory,
        archive=demo_archive,
    )
    said: list[str] = []
    execs, ends, idle, read = suite.run(["exec", "delete", "density", "io"], options, said.append)

    for way in ("runc", "casemate"):
        assert len(execs.values(way, measures.EXEC)) == len(execs.values(way, measures.EXEC_FIRST_BYTE)) == 6
        killed, gone = ends.values(way, measures.KILL), ends.values(way, measures.KILL_GONE)
        assert all(0 < one <= other for one, other in zip(killed, gone, strict=True))
        assert len(ends.values(way, measures.DELETE)) == 2
        # how much of it is shared depends on what else runs on this machine
        shares = idle.values(way, measures.PSS)
        assert all(found > measures.MIB for found in (*shares, *idle.values(way, measures.PSS_ALONE)))
        shims = idle.values(way, measures.PSS_SHIM)
        assert all(measures.MIB < one < other for one, other in zip(shims, shares, strict=True))
        rates = (measures.ROOTFS_WARM, measures.VOLUME_WARM, measures.BLOCK)
        for name in (*rates, measures.TCP_IN, measures.TCP_OUT, measures.OUTPUT):
            assert len(read.values(way, name)) == 2
        assert all(0 < answer < 1 for answer in read.values(way, measures.TCP_ANSWER))
    assert idle.values("runc", measures.GUEST_USED) == []
    assert all(8 << 20 < used < 256 << 20 for used in idle.values("casemate", measures.GUEST_USED))
    hosts = zip(
        idle.values("casemate", measures.PSS_HOST), idle.values("casemate", measures.PSS), strict=True
    )
    assert all(one < other for one, other in hosts)
    verdicts = {one.target.name: one.verdict for one in targets.judge([execs, ends, idle, read])}
    assert verdicts["exec"] in (targets.Verdict.REACHED, targets.Verdict.MISSED)
    assert verdicts["start.restored"] is targets.Verdict.NOT_MEASURED


@pytest.mark.timeout(600)
def test_a_checkout_is_measured_against_another(bench: Bench, tmp_path: Path) -> None:
    """What `make bench-compare` does, with a copy of this checkout for the other."""
    other = tmp_path / "other"
    for package in ("agent", "cli", "config", "images", "rpc", "shim"):
        shutil.copytree(CHECKOUT / package, other / package, ignore=shutil.ignore_patterns("__pycache__"))
    words = ("--runtime", f"base=casemate@{other}", "--runtime", "this=casemate", "--rounds", "2", "--json")
    done = bench("exec", *words)
    assert done.returncode == 0, done.stderr
    assert f"building the guest image of {other}" in done.stderr
    found = document.from_json(json.loads(done.stdout))
    assert [way.name for way in found.ways] == ["base", "this"]
    assert stats.ratio(found.samples, measures.EXEC, "this", "base").rounds == 2


def test_the_floor_is_measured_step_by_step_and_leaves_nothing(pods: Pods) -> None:
    done = casemate(pods.ctr.instance, "bench", "floor", "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    rows = {row["step"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == list(floor.STEPS)
    assert rows[floor.OPENED]["by_hand_s"] is rows[floor.OPENED]["ratio"] is None
    for step in (floor.STARTED, floor.LOADED, floor.RESUMED, floor.ANSWERED):
        assert 0 < rows[step]["by_hand_s"] < rows[floor.ALL]["by_hand_s"]
        assert 0 < rows[step]["libvirt_s"] < rows[floor.ALL]["libvirt_s"]
        assert rows[step]["ratio"]["rounds"] == 2
