"""containerd's Sandbox API on a pod: every method is a translation, none decides anything."""

import json
import os
import time

from rpc.api import cri
from rpc.api import sandbox as api
from rpc.api.cgroups import Metrics
from rpc.api.types import Any, Metric, Platform, Timestamp
from rpc.errors import InvalidArgument, NotFound, Unavailable, Unimplemented
from rpc.server import Context, Server
from shim.pod import Pod
from shim.sandboxlife import NewSandbox, SandboxLife
from shim.services.settled import Settled

SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
# Options of a runtime's table in containerd's configuration, which the task API is handed, too. None is ours.
OPTIONS_OF_RUNTIMES = frozenset(
    ("", "runtimeoptions.v1.Options", "containerd.runc.v1.Options", "google.protobuf.Empty")
)
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # uname(2)'s to Go's


class SandboxService:
    """Serves containerd.runtime.sandbox.v1.Sandbox. on_shutdown is called when nothing is left to serve.

    metrics: of what the pod uses now; raises CasemateError.
    """

    def __init__(
        self,
        life: SandboxLife,
        pod: Pod,
        metrics: "Callable[[], Metrics]",
        on_shutdown: "Callable[[], None]",
    ) -> None:
        self._life = life
        self._pod = pod
        self._metrics = metrics
        self._on_shutdown = on_shutdown
        self._settled = Settled()

    def register(self, server: Server) -> None:
        server.add(api.CREATE, self.create)
        server.add(api.START, self.start)
        server.add(api.PLATFORM, self.platform)
        server.add(api.STOP, self.stop)
        server.add(api.WAIT, self.wait)
        server.add(api.STATUS, self.status)
        server.add(api.PING, self.ping)
        server.add(api.SHUTDOWN, self.shutdown)
        server.add(api.METRICS, self.metrics)
        server.add(api.UPDATE, self.update)

    def _check(self, sandbox_id: str) -> None:
        if sandbox_id != self._pod.identity.pod_id:
            raise NotFound(f"sandbox {sandbox_id}: this is the shim of {self._pod.identity.pod_id}")

    async def create(self, request: api.CreateSandboxRequest, _: Context) -> api.CreateSandboxResponse:
        if not self._life.is_created:  # of two ids, the second is one sandbox too many
            self._check(request.sandbox_id)
        new = NewSandbox(
            bundle=request.bundle_path,
            mounts=tuple(request.rootfs),
            config=_config(request.options),
            netns_path=request.netns_path,
            annotations=request.annotations,
        )
        await self._settled(self._life.create(new))
        return api.CreateSandboxResponse()

    async def start(self, request: api.StartSandboxRequest, _: Context) -> api.StartSandboxResponse:
        self._check(request.sandbox_id)
        pid = await self._settled(self._life.start())
        made = self._life.made
        return api.StartSandboxResponse(
            pid=pid,
            created_at=Timestamp.from_ns(made.created_ns),
            spec=Any(type_url=SPEC, value=json.dumps(made.document).encode()),
        )

    async def platform(self, request: api.PlatformRequest, _: Context) -> api.PlatformResponse:
        self._check(request.sandbox_id)
        machine = os.uname().machine
        return api.PlatformResponse(
            platform=Platform(os="linux", architecture=ARCHITECTURES.get(machine, machine))
        )

    async def stop(self, request: api.StopSandboxRequest, _: Context) -> api.StopSandboxResponse:
        self._check(request.sandbox_id)
        await self._settled(self._life.stop(request.timeout_secs))
        return api.StopSandboxResponse()

    async def wait(self, request: api.WaitSandboxRequest, _: Context) -> api.WaitSandboxResponse:
        self._check(request.sandbox_id)
        end = await self._life.wait()
        return api.WaitSandboxResponse(
            exit_status=end.exit_status, exited_at=Timestamp.from_ns(end.exited_at_ns)
        )

    async def status(self, request: api.SandboxStatusRequest, _: Context) -> api.SandboxStatusResponse:
        self._check(request.sandbox_id)
        life, made = self._life, self._life.made
        end = life.end
        return api.SandboxStatusResponse(
            sandbox_id=request.sandbox_id,
            pid=life.pid,
            state=api.READY if life.is_ready else api.NOT_READY,
            info=self._info() if request.verbose else {},
            created_at=Timestamp.from_ns(made.created_ns),
            exited_at=Timestamp.from_ns(end.exited_at_ns) if end else None,
        )

    def _info(self) -> dict[str, str]:
        """`info` is what crictl shows of a pod of CRI's (podsandbox/types/sandbox_info.go), `casemate` what
        state.json has of it."""
        life, made = self._life, self._life.made
        shown = {
            "pid": life.pid,
            "processStatus": "running" if life.is_ready else "stopped" if life.end else "created",
            "runtimeSpec": made.document,
        }
        return {
            "info": json.dumps(shown),
            "pid": str(life.pid),
            "state": api.READY if life.is_ready else api.NOT_READY,
            "networkSandboxPath": made.new.netns_path,
            "casemate": json.dumps(self._pod.described("running" if life.is_ready else "stopping")),
        }

    async def ping(self, request: api.PingRequest, _: Context) -> api.PingResponse:
        self._check(request.sandbox_id)
        if not self._life.is_ready:
            raise Unavailable(f"sandbox {request.sandbox_id} does not run")
        return api.PingResponse()

    async def shutdown(self, request: api.ShutdownSandboxRequest, _: Context) -> api.ShutdownSandboxResponse:
        """Also of one that is being started: nobody waits for it any more."""
        self._check(request.sandbox_id)
        try:
            if self._life.is_ending_or_ready:
                await self._settled(self._life.stop(0))
        finally:
            self._on_shutdown()
        return api.ShutdownSandboxResponse()

    async def metrics(self, request: api.SandboxMetricsRequest, _: Context) -> api.SandboxMetricsResponse:
        self._check(request.sandbox_id)
        data = Any.pack(self._metrics())
        now = Timestamp.from_ns(time.time_ns())
        return api.SandboxMetricsResponse(metrics=Metric(timestamp=now, id=request.sandbox_id, data=data))

    async def update(self, request: api.UpdateSandboxRequest, _: Context) -> api.UpdateSandboxResponse:
        """As containerd expects of one that does not: it keeps the new words itself."""
        raise Unimplemented(
            "UpdateSandbox: a virtual machine has what it was started with",
            hint="what containers may use is updated by their own resources",
        )


def _config(options: Any | None) -> cri.PodSandboxConfig | None:
    """Raises InvalidArgument for options of a kind that nobody here has read about."""
    if options is None or options.type_url in OPTIONS_OF_RUNTIMES:
        return None
    if options.type_url.rpartition("/")[2] != cri.PodSandboxConfig.NAME:
        raise InvalidArgument(
            f"options of type {options.type_url}: a sandbox is described by {cri.PodSandboxConfig.NAME}"
        )
    return cri.PodSandboxConfig.decode(options.value)


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
