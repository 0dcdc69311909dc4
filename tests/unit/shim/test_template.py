"""The store of templates: all or nothing, verified once, nothing left by makers that were killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rpc.errors import DataLoss, InvalidArgument, NotFound, PermissionDenied
from shim.vm import template
from shim.vm.template import FORMAT, MANIFEST, RAM, RETRY_S, STATE, TemplateStore, key_of, last_used, load
from tests.unit.shim.templates import MIB, flip_byte, key, make, write

KEY = key(1)
ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    return TemplateStore(tmp_path / "templates", tmp_path / "run/templates")


def staged(store: TemplateStore) -> list[str]:
    return sorted(os.listdir(store.root / "tmp"))


def use(store: TemplateStore, of: str = KEY) -> None:
    with store.opened(of):
        pass


# -- making ------------------------------------------------------------------------------------------------


def test_a_template_is_there_at_once_and_whole(store: TemplateStore) -> None:
    with store.making(KEY) as staging:
        assert staging is not None
        write(staging)
        assert store.keys() == ()
        made = store.publish(staging, {"profile": "default"})
    assert (made.key, made.directory) == (KEY, store.root / KEY)
    assert made.about["profile"] == "default"
    assert sorted(path.name for path in made.directory.iterdir()) == sorted((MANIFEST, RAM, STATE))
    assert staged(store) == []
    assert load(made.directory) == made


def test_what_is_in_a_template_is_for_root_alone(store: TemplateStore) -> None:
    assert make(store, KEY).directory.stat().st_mode & 0o077 == 0


def others_write(root: Path) -> None:
    root.chmod(0o1777)


def others_write_above(root: Path) -> None:
    root.parent.chmod(0o777)


def a_group_writes(root: Path) -> None:
    os.chown(root, -1, 65534)
    root.chmod(0o775)


def is_anothers(root: Path) -> None:
    os.chown(root, 65534, -1)


def comes_by_anothers_link(root: Path) -> None:
    root.rename(root.with_name("elsewhere"))
    root.symlink_to("elsewhere")
    os.chown(root, 65534, -1, follow_symlinks=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize(
    "change", [others_write, others_write_above, a_group_writes, is_anothers, comes_by_anothers_link]
)
def test_where_others_could_put_a_template_none_is_used_made_or_removed(
    store: TemplateStore, change: Callable[[Path], None]
) -> None:
    make(store, KEY)
    change(store.root)
    for attempt in (store.opened(KEY), store.making(key(2))):
        with pytest.raises(PermissionDenied, match="others than root can write to"), attempt:
            pass
    with pytest.raises(PermissionDenied):
        store.remove(KEY)
    assert store.keys() == (KEY,)


def test_where_others_may_make_directories_of_their_own_is_fine(store: TemplateStore, tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)  # as /tmp and /dev/shm are
    make(store, KEY)
    use(store)
    link = TemplateStore(tmp_path / "link", tmp_path / "run/templates")
    link.root.symlink_to(store.root)
    use(link)


def test_a_new_directory_is_nobody_elses_whatever_the_umask(store: TemplateStore) -> None:
    before = os.umask(0)
    try:
        make(store, KEY)
    finally:
        os.umask(before)
    use(store)


def test_what_was_not_published_is_not_there(store: TemplateStore) -> None:
    with pytest.raises(ZeroDivisionError), store.making(KEY) as staging:
        assert staging is not None
        write(staging)
        raise ZeroDivisionError
    assert store.version(KEY) == ""
    assert staged(store) == []


def test_one_process_makes_a_template_at_a_time(store: TemplateStore) -> None:
    with store.making(KEY) as first, store.making(KEY) as second, store.making(key(2)) as other:
        assert first is not None
        assert second is None
        assert other is not None
        assert first.is_dir()
    with store.making(KEY) as again:
        assert again is not None
    assert staged(store) == []


def test_a_template_replaces_that_of_the_same_key(store: TemplateStore) -> None:
    make(store, KEY, profile="old")
    before = store.version(KEY)
    make(store, KEY, profile="new")
    assert load(store.root / KEY).about["profile"] == "new"
    assert store.version(KEY) not in ("", before)
    use(store)
    assert staged(store) == []


def test_only_the_version_that_was_seen_is_removed(store: TemplateStore) -> None:
    """Whoever failed to restore from one must not take away the next."""
    make(store, KEY)
    seen = store.version(KEY)
    make(store, KEY)
    assert not store.remove(KEY, seen)
    assert store.remove(KEY, store.version(KEY))
    assert store.version(KEY) == ""


MAKER = f"""
import sys
from pathlib import Path
from shim.vm.template import TemplateStore
from tests.unit.shim.templates import write
with TemplateStore(Path(sys.argv[1]), Path("/nowhere")).making({KEY!r}) as staging:
    write(staging)
    print(flush=True)
    sys.stdin.read()
"""


def test_a_maker_that_was_killed_leaves_nothing(store: TemplateStore) -> None:
    """Its lock ends with it; its files go with the next maker, or with gc."""
    argv = [sys.executable, "-c", MAKER, str(store.root)]
    for take_away in (lambda: store.gc(lambda _: True, 16), lambda: make(store, KEY)):
        maker = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert maker.stdout is not None
        assert maker.stdout.readline() == b"\n"
        with store.making(KEY) as staging:
            assert staging is None
        store.gc(lambda _: True, 16)  # must not touch what is being made
        assert sorted(os.listdir(store.root / "tmp" / KEY)) == sorted((RAM, STATE))
        maker.kill()
        maker.communicate()
        assert staged(store) == [KEY, f"{KEY}.lock"]
        take_away()
        assert staged(store) == []


def test_a_removal_that_was_killed_leaves_nothing_after_gc(store: TemplateStore) -> None:
    made = make(store, KEY)
    made.directory.rename(store.root / "tmp" / f"{KEY}.0badcafe")
    assert store.gc(lambda _: True, 16) == ()
    assert staged(store) == []


def test_gc_leaves_alone_what_is_not_ours(store: TemplateStore) -> None:
    make(store, KEY)
    for stranger in (store.root / "lost+found", store.root / "tmp/.hidden", store.root / "tmp/notes"):
        stranger.mkdir()
    with store.making(key(2)) as staging:
        assert staging is not None
        store.gc(lambda _: True, 0)
        assert staging.is_dir()
    assert sorted(os.listdir(store.root)) == ["lost+found", "tmp"]
    assert staged(store) == [".hidden", "notes"]


@pytest.mark.parametrize("odd", ["", ".", "..", "../x", "tmp", "A" * 32, "0" * 31, "0" * 33])
def test_what_is_no_key_is_refused(store: TemplateStore, odd: str) -> None:
    make(store, KEY)
    with pytest.raises(InvalidArgument, match="is no key of a template"):
        store.remove(odd)
    with pytest.raises(InvalidArgument, match="is no key of a template"), store.making(odd):
        pass
    use(store)


# -- using -------------------------------------------------------------------------------------------------


def test_a_template_is_given_open(store: TemplateStore) -> None:
    before = len(os.listdir("/proc/self/fd"))
    make(store, KEY, profile="default")
    with store.opened(KEY) as opened:
        assert opened.template.about["profile"] == "default"
        assert os.pread(opened.state, 6, 0) == b"state "
        assert os.pread(opened.ram, 4, 5 * MIB) == b"ram "
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_that_is_removed_meanwhile_stays_good_for_whoever_has_it(store: TemplateStore) -> None:
    make(store, KEY)
    with store.opened(KEY) as opened:
        assert store.remove(KEY)
        assert not store.remove(KEY)
        assert os.pread(opened.state, 6, 0) == b"state "
        assert os.pread(opened.ram, 4, 0) == b"ram "
    with pytest.raises(NotFound):
        use(store)


def test_one_that_is_replaced_meanwhile_is_not_mixed_with_the_next(store: TemplateStore) -> None:
    make(store, KEY, profile="old")
    with store.opened(KEY) as opened:
        make(store, KEY, profile="new")
        flip_byte(store.root / KEY / STATE, 0)
        assert opened.template.about["profile"] == "old"
        assert os.pread(opened.state, 6, 0) == b"state "


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read: list[int] = []
    digest_of = template.digest_of

    def count(fd: int) -> str:
        read.append(fd)
        return digest_of(fd)

    monkeypatch.setattr(template, "digest_of", count)
    return read


def test_a_template_is_read_for_verification_once(
    store: TemplateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(store, KEY)
    read = counted(monkeypatch)
    use(store)
    assert read == []  # its maker has just read it
    other = TemplateStore(store.root, tmp_path / "after-a-boot")
    with other.opened(KEY) as opened:
        assert len(read) == 2
        # QEMU reads on from where a descriptor stands.
        assert [os.lseek(fd, 0, os.SEEK_CUR) for fd in (opened.ram, opened.state)] == [0, 0]
    use(other)
    assert len(read) == 2


def test_a_template_that_may_have_changed_is_read_again(
    store: TemplateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(store, KEY)
    read = counted(monkeypatch)
    os.utime(made.directory / STATE)
    use(store)
    assert len(read) == 2


def test_what_was_verified_before_the_host_was_booted_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where what is remembered is on a disk: of a power cut, the files may be damaged with the same times."""
    store = TemplateStore(tmp_path / "templates", tmp_path / "memory")
    make(store, KEY)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    remembered = tmp_path / "memory" / KEY
    assert boot in remembered.read_text()
    remembered.write_text(remembered.read_text().replace(boot, "b5a1f3c2-0000-4000-8000-000000000002"))
    read = counted(monkeypatch)
    use(store)
    use(store)
    assert len(read) == 2


@pytest.mark.parametrize("memory", ["a file", "nothing"])
def test_what_cannot_be_remembered_is_read_each_time(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "memory"
    if memory == "a file":
        place.write_text("")
    store = TemplateStore(tmp_path / "templates", place / "below")
    make(store, KEY)
    read = counted(monkeypatch)
    use(store)
    assert bool(read) == (memory == "a file")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        pytest.param(lambda path: flip_byte(path / STATE, 77), STATE, id="state"),
        pytest.param(lambda path: flip_byte(path / RAM, 5 * MIB + 9), RAM, id="ram"),
        pytest.param(lambda path: flip_byte(path / RAM, 7 * MIB), RAM, id="ram, in a hole"),
        pytest.param(lambda path: os.truncate(path / RAM, 32 * MIB), RAM, id="ram cut"),
        pytest.param(lambda path: os.truncate(path / RAM, 65 * MIB), RAM, id="ram longer"),
        pytest.param(lambda path: os.truncate(path / STATE, 0), STATE, id="state empty"),
    ],
)
def test_damage_is_noticed_each_time(
    store: TemplateStore, damage: Callable[[Path], None], named: str
) -> None:
    made = make(store, KEY)
    use(store)
    damage(made.directory)
    for _ in range(2):
        with pytest.raises(DataLoss, match=f"{KEY}/{named} of a template is damaged"):
            use(store)


def test_which_zeros_are_holes_does_not_matter(store: TemplateStore) -> None:
    """A copy of a store to another file system is as good."""
    made = make(store, KEY)
    with open(made.directory / RAM, "r+b") as ram:
        ram.seek(20 * MIB)
        ram.write(bytes(MIB))
    use(store)


@pytest.mark.parametrize("name", [RAM, STATE, MANIFEST])
def test_a_file_that_is_missing_is_named(store: TemplateStore, name: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    made = make(store, KEY)
    (made.directory / name).unlink()
    with pytest.raises(NotFound, match=f"{KEY} is no template: no file {name}"):
        use(store)
    assert len(os.listdir("/proc/self/fd")) == before


def test_there_is_no_template_in_an_empty_store(store: TemplateStore) -> None:
    assert store.version(KEY) == ""
    assert store.list() == ()
    assert store.gc(lambda _: True, 16) == ()
    assert not store.remove(KEY)
    with pytest.raises(NotFound):
        use(store)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        "[]",
        "null",
        "{}",
        '{"format": 1}',
        '{"format": 1, "sha256": "x"}',
        '{"format": 1, "sha256": {"ram": 1, "state": "x"}}',
        f'{{"format": {FORMAT + 1}, "sha256": {{"ram": "x", "state": "x"}}}}',
        "\udc80",
    ],
)
def test_a_manifest_that_is_none_is_a_loss(store: TemplateStore, text: str) -> None:
    made = make(store, KEY)
    (made.directory / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataLoss, match=r"manifest\.json cannot be read"):
        use(store)
    assert store.list() == ()
    assert store.keys() == (KEY,)


# -- collecting --------------------------------------------------------------------------------------------


def test_those_used_last_are_listed_first_and_kept(store: TemplateStore) -> None:
    for number in (1, 2, 3, 4):
        made = make(store, key(number), image="old" if number == 4 else "new")
        os.utime(made.directory, (number, number))
    use(store, key(1))
    assert abs(last_used(load(store.root / key(1))) - time.time()) < 60
    assert [found.key for found in store.list()] == [key(1), key(4), key(3), key(2)]

    def wanted(one: template.Template) -> bool:
        return bool(one.about["image"] == "new")

    assert sorted(store.doomed(wanted, 2)) == [key(2), key(4)]
    assert len(store.list()) == 4
    assert sorted(store.gc(wanted, 2)) == [key(2), key(4)]
    assert [found.key for found in store.list()] == [key(1), key(3)]
    assert sorted(store.gc(wanted, 0)) == [key(1), key(3)]


def test_one_more_is_made_where_there_is_room_or_one_that_nobody_uses(store: TemplateStore) -> None:
    """Tenants may choose shapes: neither may they fill the disk, nor take others' templates away."""
    for number in range(3):
        make(store, key(number))
    assert store.make_room(4, 3600)
    assert not store.make_room(3, 3600)
    assert len(store.keys()) == 3
    for number, age_s in ((1, 7200), (2, 5400)):
        then = time.time() - age_s
        os.utime(store.root / key(number), (then, then))
    assert store.make_room(3, 3600)
    assert sorted(store.keys()) == [key(0), key(2)]
    (store.root / key(4)).mkdir()  # which no pod can read
    assert not store.make_room(1, 3600)  # the last one is in use
    assert store.keys() == (key(0),)


def test_what_no_pod_can_read_is_collected(store: TemplateStore) -> None:
    """A format of before an upgrade has keys of its own: nobody would ever come across it."""
    make(store, KEY)
    old = make(store, key(2))
    (old.directory / MANIFEST).write_text(json.dumps({"format": FORMAT - 1}))
    (store.root / key(3)).mkdir()
    assert sorted(store.doomed(lambda _: True, 16)) == [key(2), key(3)]
    assert sorted(store.gc(lambda _: True, 16)) == [key(2), key(3)]
    assert store.keys() == (KEY,)


# -- failing -----------------------------------------------------------------------------------------------


def age(store: TemplateStore, directory: Path, seconds: float) -> None:
    for path in directory.iterdir():
        if path.is_file():
            then = path.stat().st_mtime - seconds
            os.utime(path, (then, then))


def test_what_failed_is_not_tried_again_at_once(store: TemplateStore, tmp_path: Path) -> None:
    assert not store.failed_lately(KEY)
    store.note_failure(KEY)
    assert store.failed_lately(KEY)
    assert not store.failed_lately(key(2))
    age(store, tmp_path / "run/templates", RETRY_S - 60)
    assert store.failed_lately(KEY)
    age(store, tmp_path / "run/templates", 70)
    assert not store.failed_lately(KEY)
    store.note_failure(KEY)
    assert store.failed_lately(KEY)


def test_a_template_that_was_made_after_all_ends_the_wait(store: TemplateStore) -> None:
    store.note_failure(KEY)
    make(store, KEY)
    assert not store.failed_lately(KEY)


def test_an_old_template_that_is_of_no_use_any_more_is_made_anew_at_once(store: TemplateStore) -> None:
    made = make(store, KEY)
    age(store, made.directory, RETRY_S + 5)
    store.note_useless(KEY)
    assert not store.failed_lately(KEY)


def test_a_new_template_that_is_of_no_use_is_not_made_again_at_once(store: TemplateStore) -> None:
    make(store, KEY)
    store.note_useless(KEY)
    assert store.failed_lately(KEY)
    store.note_useless(key(2))  # there is none
    assert not store.failed_lately(key(2))


# -- keys --------------------------------------------------------------------------------------------------


def test_a_key_stands_for_all_of_its_parts() -> None:
    parts = {"image": "a", "qemu": "b"}
    assert key_of(parts) == key_of(dict(reversed(parts.items())))
    assert len({key_of(parts), key_of({"image": "a"}), key_of({"image": "a", "qemu": "c"}), key_of({})}) == 4
    assert len(key_of(parts)) == 32
