"""What tests of file systems say, read, compared with runc's, and made a page of."""

import pytest

from rpc.errors import DataLoss
from tests.posix import linux, page, reasons, trying
from tests.posix.trying import OK, SKIPPED, Tried

SAID = """\
chmod::update_ctime::regular                                              ok
\x20
rmdir::ebusy                                                             skipped
	Remounts (allow_remount) are not allowed in the configuration file
unlink::eperm::char                                                      FAILED
	called `Result::unwrap()` on an `Err` value: EPERM

Summary: 1 failed, 1 skipped, 1 passed, 0 expected failures, 3 total
"""
FACTS = {
    "pjdfstest": "pjdfstest 1",
    "fsx": "fsx 2",
    "kernel": "6.1",
    "virtiofsd": "virtiofsd 3",
}
ACL = "linux access_lists_decide"


def tried(way: str, mounted: str, changed: dict[str, str] | None = None) -> Tried:
    outcomes = dict.fromkeys(("pjdfstest a", "fsx seed 1", ACL), OK) | (changed or {})
    return Tried(way, "volume", mounted, outcomes)


def test_each_outcome_of_pjdfstest_is_read_with_its_reason() -> None:
    assert dict(trying.read_pjdfstest(SAID)) == {
        "pjdfstest chmod::update_ctime::regular": OK,
        "pjdfstest rmdir::ebusy": SKIPPED,
        "pjdfstest unlink::eperm::char": "called `Result::unwrap()` on an `Err` value: EPERM",
    }


@pytest.mark.parametrize("cut", ["Summary: ", "unlink::eperm::char"])
def test_a_pjdfstest_that_ended_early_is_no_result(cut: str) -> None:
    with pytest.raises(DataLoss, match="did not come to its end"):
        dict(trying.read_pjdfstest(SAID.replace(cut, "")[: SAID.index("Summary") + 20]))


def test_our_own_say_how_many_they_were() -> None:
    said = "locks: ok\nholes: OSError(95, 'no')\n2 tried\n"
    assert dict(trying.read_linux(said)) == {"linux locks": OK, "linux holes": "OSError(95, 'no')"}
    with pytest.raises(DataLoss):
        dict(trying.read_linux("locks: ok\nTraceback\n"))


def test_every_one_of_our_own_is_run() -> None:
    defined = {name for name, value in vars(linux).items() if getattr(value, "__code__", None)}
    helpers = {"contextmanager", "called", "opened", "refused", "in_child", "main"}
    helpers |= {"fallocate", "_other_locks", "renameat2"}
    assert {trial.__name__ for trial in linux.TRIALS} == defined - helpers


def test_what_differs_is_on_the_page_with_its_reason_and_what_is_new_is_told() -> None:
    runc = tried("runc", "ext4")
    ours = tried("casemate-virtiofs", "virtiofs", {ACL: "no", "pjdfstest a": "EIO"})
    new = page.unexplained([runc, ours])
    assert [one.test for one in new] == ["pjdfstest a"]
    text = page.page([runc, ours], {"casemate-9p": "it goes over vsock alone"}, FACTS)
    assert "| volume | virtiofs | ext4 | 3 | 1 | 0 | 2 |" in text
    assert f"| `{ACL}` | fails | {reasons.REASONS[0].why} |" in text
    assert "| `pjdfstest a` | fails | NOT EXPLAINED: EIO |" in text
    assert "casemate-9p was left out, as this machine cannot run it: it goes over vsock alone.\n" in text


def test_what_fails_with_both_is_no_difference() -> None:
    runc = tried("runc", "tmpfs", {"fsx seed 1": "no", "pjdfstest a": SKIPPED})
    ours = tried("casemate-9p", "tmpfs", {"fsx seed 1": "another", "pjdfstest a": SKIPPED})
    (compared,) = page.pairs([runc, ours])
    assert (compared.same, compared.neither, compared.differences) == (1, 2, ())


def test_runs_that_tried_other_things_are_not_compared() -> None:
    with pytest.raises(DataLoss, match="more"):
        page.compare(tried("runc", "ext4"), tried("casemate-virtiofs", "virtiofs", {"linux more": OK}))


def test_the_place_of_a_path_is_the_last_that_was_mounted_there() -> None:
    mounts = "none / virtiofs rw 0 0\nproc /proc proc rw 0 0\ntmpfs /tried tmpfs rw 0 0\n"
    assert trying.mounted_at(mounts, "/tried") == "tmpfs"
    assert trying.mounted_at(mounts, "/other") == "virtiofs"
