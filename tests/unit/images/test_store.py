"""The store: finding, leasing, adding, removing; several at once; interrupted and damaged."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from images.image import INITRD, KERNEL, MANIFEST, ROOTFS, check_name, sha256_of
from images.store import ImageStore
from rpc.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from tests.unit.images.fakes import add_image


def test_an_image_is_found_by_name_and_by_digest(store: ImageStore, scratch: Path) -> None:
    added = add_image(store, scratch)
    for reference in ("default", added.digest, added.hex, added.hex[:6], added.digest[:13]):
        found = store.resolve(reference)
        assert found.digest == added.digest
        assert found.kernel.read_text() == "kernel" * 1000
        assert found.rootfs.read_text() == "rootfs" * 1000
        assert found.initrd == found.directory / INITRD
        assert found.cmdline == "quiet"
    assert store.resolve("default").name == "default"
    assert store.resolve(added.hex).name == added.hex[:12]
    assert added.size_bytes == 18000


def test_the_digest_is_that_of_the_manifest(store: ImageStore, scratch: Path) -> None:
    added = add_image(store, scratch)
    assert added.hex == sha256_of(added.directory / MANIFEST) == added.directory.name


@pytest.mark.parametrize("reference", ["default", "sha256:" + "0" * 64, "abcdef0", "nothing"])
def test_a_missing_image_tells_how_to_get_one(store: ImageStore, reference: str) -> None:
    with pytest.raises(NotFound) as caught:
        store.resolve(reference)
    assert reference in caught.value.brief
    assert caught.value.hint == "casemate image build"


def test_an_abbreviation_of_two_images_is_refused(store: ImageStore, scratch: Path) -> None:
    first = add_image(store, scratch)
    twin = first.hex[:8] + "0" * 56
    os.symlink(first.directory.name, first.directory.parent / twin)
    with pytest.raises(InvalidArgument, match="ambiguous"):
        store.resolve(first.hex[:8])


@pytest.mark.parametrize(
    "name", ["", ".hidden", "../x", "a/b", "Upper", "-x", "a" * 129, "white space", "nul\0"]
)
def test_what_cannot_be_a_name_is_refused(store: ImageStore, name: str) -> None:
    with pytest.raises(InvalidArgument):
        check_name(name)
    with pytest.raises(InvalidArgument):
        store.resolve(name)


@given(st.from_regex(r"[a-z0-9][a-z0-9._-]{0,127}", fullmatch=True))
def test_a_name_is_never_a_path(name: str) -> None:
    check_name(name)
    assert os.path.basename(name) == name
    assert name not in (".", "..")


def test_a_name_that_looks_like_a_digest_wins(store: ImageStore, scratch: Path) -> None:
    first = add_image(store, scratch, "one", kernel="a")
    second = add_image(store, scratch, first.hex[:8], kernel="b")
    assert store.resolve(first.hex[:8]).digest == second.digest
    assert store.resolve(f"sha256:{first.hex[:8]}").digest == first.digest


def test_the_same_content_is_the_same_image(store: ImageStore, scratch: Path) -> None:
    first, second = add_image(store, scratch, "one"), add_image(store, scratch, "two")
    assert first.digest == second.digest
    assert [(entry.digest, entry.names) for entry in store.list()] == [(first.digest, ("one", "two"))]


def test_versions_share_the_files_that_are_the_same(store: ImageStore, scratch: Path) -> None:
    old, new = add_image(store, scratch, rootfs="old"), add_image(store, scratch, rootfs="new")
    assert old.kernel.stat().st_ino == new.kernel.stat().st_ino
    assert old.rootfs.stat().st_ino != new.rootfs.stat().st_ino


def test_a_damaged_file_is_not_shared(store: ImageStore, scratch: Path) -> None:
    old = add_image(store, scratch, rootfs="old")
    old.kernel.write_text("damaged")
    new = add_image(store, scratch, rootfs="new")
    store.verify(new)
    assert new.kernel.read_text() == "kernel" * 1000


def test_the_name_moves_and_the_old_version_stays_until_gc(store: ImageStore, scratch: Path) -> None:
    old, new = add_image(store, scratch, rootfs="old"), add_image(store, scratch, rootfs="new")
    assert store.resolve("default").digest == new.digest
    assert store.resolve(old.digest).rootfs.read_text() == "old" * 1000
    collected = store.gc()
    assert (collected.removed, collected.in_use) == ((old.digest,), ())
    with pytest.raises(NotFound):
        store.resolve(old.digest)
    store.verify(store.resolve("default"), full=True)


def test_gc_leaves_what_is_in_use(store: ImageStore, scratch: Path) -> None:
    old = add_image(store, scratch, rootfs="old")
    add_image(store, scratch, rootfs="new")
    with store.lease(old), store.lease(old):
        collected = store.gc()
        assert (collected.removed, collected.in_use) == ((), (old.digest,))
        assert old.rootfs.exists()
    assert store.gc().removed == (old.digest,)


def test_an_image_in_use_by_another_process_is_not_removed(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    code = (
        "import sys\nfrom pathlib import Path\nfrom images.store import ImageStore\n"
        "store = ImageStore(Path(sys.argv[1]))\n"
        "with store.lease(store.resolve('default')):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    checkout = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", code, store.root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(FailedPrecondition, match="in use"):
            store.remove("default")
        assert store.resolve("default").digest == image.digest
        holder.stdin.close()
    assert store.remove("default") == image.digest


def test_a_lease_is_not_inherited_by_programs(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    with store.lease(image):
        heir = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert store.remove("default") == image.digest
    finally:
        heir.kill()
        heir.wait()


def test_removing_one_of_several_names_leaves_the_image(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch, "one")
    add_image(store, scratch, "two")
    assert store.remove("one") == image.digest
    assert store.names() == {"two": image.hex}
    store.verify(store.resolve("two"), full=True)
    store.remove("two")
    assert store.list() == ()


def test_removing_by_digest_takes_all_names_with_it(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch, "one")
    add_image(store, scratch, "two")
    store.remove(image.hex[:12])
    assert store.names() == {}
    assert store.list() == ()
    with pytest.raises(NotFound):
        store.remove("two")


def test_a_lease_on_a_removed_image_is_refused(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    store.remove("default")
    with pytest.raises(NotFound), store.lease(image):
        pass
    add_image(store, scratch)
    with store.lease(image):
        pass


def test_a_failed_addition_leaves_nothing(store: ImageStore, scratch: Path) -> None:
    for name in (KERNEL, ROOTFS):
        (scratch / name).write_text("x")
    with pytest.raises(FileNotFoundError):
        store.add("default", {KERNEL: scratch / KERNEL, ROOTFS: scratch / "missing"}, {"cmdline": ""})
    assert list((store.root / "tmp").iterdir()) == []
    assert list((store.root / "images").iterdir()) == []
    assert store.names() == {}


def test_an_image_without_an_initramfs(store: ImageStore, scratch: Path) -> None:
    (scratch / "file").write_text("x")
    image = store.add("default", {KERNEL: scratch / "file", ROOTFS: scratch / "file"}, {"cmdline": ""})
    assert image.initrd is None
    store.verify(image)


@pytest.mark.parametrize(
    ("files", "about"),
    [((KERNEL,), {"cmdline": ""}), ((KERNEL, ROOTFS, "more"), {"cmdline": ""}), ((KERNEL, ROOTFS), {})],
)
def test_an_incomplete_image_is_refused(
    store: ImageStore, scratch: Path, files: tuple[str, ...], about: dict[str, str]
) -> None:
    (scratch / "file").write_text("x")
    with pytest.raises(InvalidArgument):
        store.add("default", dict.fromkeys(files, scratch / "file"), about)


def test_adding_again_mends_a_damaged_image(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    image.rootfs.write_text("damaged")
    again = add_image(store, scratch)
    assert again.digest == image.digest
    store.verify(again)


def test_a_damaged_image_in_use_is_not_replaced(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    with store.lease(image):
        image.rootfs.write_text("damaged")
        with pytest.raises(FailedPrecondition, match="damaged and in use"):
            add_image(store, scratch)
        assert image.rootfs.read_text() == "damaged"


def test_a_damaged_manifest_is_listed_and_can_be_removed(store: ImageStore, scratch: Path) -> None:
    image = add_image(store, scratch)
    (image.directory / MANIFEST).write_text("{")
    with pytest.raises(DataLoss):
        store.resolve("default")
    (entry,) = store.list()
    assert entry.image is None
    assert "damaged" in entry.problem
    assert store.remove("default") == image.digest
    assert store.list() == ()


def test_gc_sweeps_what_was_interrupted(store: ImageStore, scratch: Path) -> None:
    add_image(store, scratch)
    leftover = store.root / "tmp/leftover"
    leftover.mkdir()
    (leftover / KERNEL).write_text("half")
    store.gc()
    assert not leftover.exists()
    assert [entry.names for entry in store.list()] == [("default",)]


def test_a_store_that_was_never_used(store: ImageStore) -> None:
    assert store.list() == ()
    assert store.gc().removed == ()
    with pytest.raises(NotFound):
        store.remove("default")


def _add(root: Path, scratch: Path, number: int, rounds: int) -> None:
    store = ImageStore(root, root.parent / "run")
    mine = scratch / str(number)
    mine.mkdir()
    for turn in range(rounds):
        image = add_image(store, mine, "default", rootfs=f"{turn % 3}")
        store.verify(store.resolve(image.digest), full=True)


def test_many_add_the_same_images_at_once(store: ImageStore, scratch: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    workers = [spawn.Process(target=_add, args=(store.root, scratch, n, 12)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0] * 6
    assert len(store.list()) == 3
    assert list((store.root / "tmp").iterdir()) == []
    for entry in store.list():
        assert entry.image is not None
        store.verify(entry.image, full=True)


def _collect(
    root: Path, ready: "multiprocessing.synchronize.Event", stop: "multiprocessing.synchronize.Event"
) -> None:
    store = ImageStore(root, root.parent / "run")
    ready.set()
    while not stop.is_set():
        store.gc()


def test_gc_never_takes_a_leased_image_away(store: ImageStore, scratch: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ready, stop = fork.Event(), fork.Event()
    collector = fork.Process(target=_collect, args=(store.root, ready, stop))
    collector.start()
    try:
        assert ready.wait(30)
        held = 0
        for turn in range(60):
            image = add_image(store, scratch, "default", rootfs=f"{turn % 2}")
            try:
                with store.lease(image):
                    held += 1
                    add_image(store, scratch, "default", rootfs=f"{(turn + 1) % 2}")
                    store.verify(image, full=True)
            except NotFound:
                continue  # it lost its name and was collected before it was leased
        assert held > 0
    finally:
        stop.set()
        collector.join(30)
    assert collector.exitcode == 0
