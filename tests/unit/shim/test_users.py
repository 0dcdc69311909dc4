"""Every pod's QEMU has a user of its own, for as long as the pod lives and not longer."""

from __future__ import annotations

import os
import pwd
from contextlib import ExitStack
from pathlib import Path

import pytest

from rpc.errors import FailedPrecondition, ResourceExhausted
from shim.vm import users
from shim.vm.users import FIRST_UID, QemuUser, qemu_user


def test_no_two_pods_have_the_same_user(tmp_path: Path) -> None:
    with ExitStack() as pods:
        taken = [pods.enter_context(qemu_user("auto", tmp_path / "users", kvm=False)) for _ in range(5)]
        assert [user.uid for user in taken] == list(range(FIRST_UID, FIRST_UID + 5))
        assert taken[3] == QemuUser(FIRST_UID + 3, f"+{FIRST_UID + 3}", f"+{FIRST_UID + 3}")


def test_a_user_is_free_again_when_its_pod_has_ended(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with qemu_user("auto", tmp_path, kvm=False) as user:
            assert user.uid == FIRST_UID
    assert len(os.listdir("/proc/self/fd")) == before


def test_when_all_are_taken_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "UIDS", 2)
    with ExitStack() as pods:
        for _ in range(2):
            pods.enter_context(qemu_user("auto", tmp_path, kvm=False))
        with pytest.raises(ResourceExhausted, match="all of the 2 users for pods are taken"):
            pods.enter_context(qemu_user("auto", tmp_path, kvm=False))


def test_the_operators_user_is_taken_by_name(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")  # whose group is nogroup on Debian
    with qemu_user("nobody", tmp_path, kvm=False) as user:
        assert user == QemuUser(nobody.pw_uid, "nobody", f"+{nobody.pw_gid}")
    assert list(tmp_path.iterdir()) == []


def test_a_user_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(FailedPrecondition, match="the user nosuchuser, which QEMU is to run as"),
        qemu_user("nosuchuser", tmp_path, kvm=False),
    ):
        pass


@pytest.mark.parametrize("group", ["kvm", None])
def test_with_kvm_the_group_is_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str | None
) -> None:
    monkeypatch.setattr(users, "kvm_group", lambda: group)
    with qemu_user("auto", tmp_path, kvm=True) as user:
        assert user.group == (group or f"+{FIRST_UID}")


def test_the_group_is_the_systems() -> None:
    assert users.kvm_group() in ("kvm", None)
