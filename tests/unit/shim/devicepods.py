"""A pod that is given devices of a host in files (devicehosts.py), on a small guest (guests.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from config.annotations import DEVICES
from rpc.errors import CasemateError
from shim.trace import Trace
from shim.vm import sources
from shim.vm.guest import Machine
from shim.vm.setting import MachineRequest
from tests.unit.rpc.wires import run
from tests.unit.shim import libvirts, pods
from tests.unit.shim.guests import FACTS, running_guest
from tests.unit.shim.pods import POD, PodOfTest, Recorder, Sleepers, config
from vfio.ledger.ledger import Ledger

TWO = "count=2,device=2330"


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def wrapper(*arguments: Any, **named: Any) -> None:
        run(test(*arguments, **named))

    return wrapper


class GivenPod:
    """A pod that asks for devices, and what its source was asked for. fails: why there is no machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: list[MachineRequest] = []
        self.fails: CasemateError | None = None
        self.test: PodOfTest
        self.domain: libvirts.Domain

    @property
    def states(self) -> dict[str, str]:
        with Ledger(Path(self.test.pod.settings.ledger_dir)) as ledger:
            return {str(each.address): each.state.value for each in ledger.devices()}

    async def create(self, name: str = POD, **document: Any) -> None:
        await self.test.create(name, document=config(**document))


@asynccontextmanager
async def given_pod(
    tmp_path: Path,
    text: str = TWO,
    fails: CasemateError | None = None,
    settings: str = "",
    document: object = None,
) -> AsyncIterator[GivenPod]:
    """text: of the annotation; document: a config.json instead of one with it. settings: the host's, TOML."""
    directory = tmp_path / "p"
    (directory / "bundles").mkdir(parents=True)
    (directory / "etc").mkdir()
    allowed = f'allowed_annotations = ["{DEVICES}"]\n'
    (directory / "etc/config.toml").write_text(allowed + settings)
    recorder, anchors, given = Recorder(), Sleepers(), GivenPod(directory)
    given.fails = fails
    with pods.host(directory), pytest.MonkeyPatch.context() as patch:
        pod = pods.empty_pod(directory, recorder, anchors)
        async with running_guest(pod.paths.directory) as guest:

            async def source(request: MachineRequest, _: Trace, __: sources.Wanted) -> Machine:
                given.requests.append(request)
                if given.fails is not None:
                    raise given.fails
                guest.machine.facts = replace(FACTS, devices=request.functions)
                given.domain = libvirts.Domain(each.address for each in request.functions)
                given.domain.host(guest.machine.host)
                return guest.machine

            patch.setattr(sources, "obtain", source)
            given.test = PodOfTest(pod, guest, recorder, anchors, directory / "bundles")
            pod.begin(config(annotations={DEVICES: text}) if document is None else document, 0.0)
            try:
                yield given
            finally:
                await pods.close(pod)
                anchors.close()
