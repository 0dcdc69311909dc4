"""Create: what it makes, what it refuses, and that it leaves nothing when it fails."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.errors import (
    AlreadyExists,
    CasemateError,
    DeadlineExceeded,
    InvalidArgument,
    NotFound,
    Unimplemented,
)
from tests.unit.rpc.wires import run
from tests.unit.shim.pods import POD, config, running_pod


def test_a_second_create_of_the_same_id_is_refused(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create()
            with pytest.raises(AlreadyExists, match="container web exists already"):
                await tested.create()
            assert tested.told == ["create web"]

    run(life())


def test_of_two_creates_at_once_one_is_refused(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            answers = await asyncio.gather(tested.create(), tested.create(), return_exceptions=True)
            assert sorted(type(answer).__name__ for answer in answers) == ["AlreadyExists", "Container"]

    run(life())


def test_a_create_that_the_guest_refuses_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            tested.agent.fails["CreateContainer"] = NotFound("exec: nosuch: not found in $PATH")
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(NotFound, match="nosuch"):
                await tested.create()
            assert list(tested.guest.machine.share.iterdir()) == []
            assert tested.pod.containers == {}
            assert len(os.listdir("/proc/self/fd")) == before
            assert tested.told == []
            del tested.agent.fails["CreateContainer"]
            await tested.create()

    run(life())


def test_what_the_guest_is_given_is_a_spec_of_its_own_paths(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create()
            document = json.loads(tested.agent.process(POD).document)
            assert document["root"] == {"path": "/run/casemate/shared/web/rootfs", "readonly": False}
            root = tested.guest.machine.share / "web/rootfs"
            assert tested.anchors.roots == [str(root)]
            assert root.is_dir()

    run(life())


@pytest.mark.parametrize(
    ("document", "error", "words"),
    [
        ({"linux": {"namespaces": []}}, Unimplemented, "host network"),
        ({"process": {"args": "sh"}}, InvalidArgument, "process.args"),
    ],
)
def test_a_spec_that_cannot_be_honoured_is_refused_before_anything_is_made(
    tmp_path: Path, document: dict[str, object], error: type[CasemateError], words: str
) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            with pytest.raises(error, match=words):
                await tested.create(document=config(**document))
            assert list(tested.guest.machine.share.iterdir()) == []
            assert tested.agent.calls in ([], ["Events"])

    run(life())


def test_a_bundle_without_a_config_is_named(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            new = tested.new()
            (Path(new.bundle) / "config.json").unlink()
            with pytest.raises(NotFound, match=r"bundles/web/config\.json does not exist"):
                await tested.pod.create(new)

    run(life())


def test_a_guest_that_fills_its_share_cannot_keep_a_container_from_being_deleted(tmp_path: Path) -> None:
    """The share belongs to the guest: it may write what it wants there."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            (tested.guest.machine.share / "web/left-behind").write_text("by the guest")
            await tested.exit()
            await tested.pod.delete(POD)
            assert tested.pod.containers == {}

    run(life())


def test_a_guest_that_took_a_containers_place_in_its_share_is_told_of(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            (tested.guest.machine.share / "web").symlink_to("/")
            with pytest.raises(CasemateError, match="web"):
                await tested.create()

    run(life())


def test_what_a_vm_makes_needless_is_left_out_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            process = {"args": ["sh"], "apparmorProfile": "docker-default"}
            await tested.create(document=config(process=process))
            assert "apparmorProfile" not in json.loads(tested.agent.process(POD).document)["process"]

    run(life())
    assert "container web: process.apparmorProfile" in caplog.text


def test_a_document_that_is_too_deep_for_the_guest_is_named(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            new = tested.new()
            path = Path(new.bundle) / "config.json"
            depth = 900
            path.write_text(path.read_text()[:-1] + ', "x": ' + '{"x":' * depth + "1" + "}" * depth + "}")
            try:
                await tested.pod.create(new)
            except CasemateError as error:
                refusal = str(error)
            else:
                return
            assert "config.json" in refusal

    run(life())


def test_a_create_that_is_late_is_given_up_in_the_guest_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            tested.agent.hold(api.CREATE_CONTAINER)
            with tested.guest.hurried(api.CREATE_CONTAINER):
                with pytest.raises(DeadlineExceeded, match="did not answer CreateContainer"):
                    await tested.create()
                assert tested.agent.containers == {}
                tested.agent.fails["Delete"] = NotFound("busy")
                with pytest.raises(DeadlineExceeded):
                    await tested.create()
            assert list(tested.guest.machine.share.iterdir()) == []

    caplog.set_level("INFO")
    run(life())
    assert "container web, given up while it was made: busy" in caplog.text
