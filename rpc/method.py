"""What a remote method is called and what travels in each direction; shared by client, server and rpc/api.

It must not import asyncio: the shim's `start` and the codec's users load it without an event loop.
"""

from __future__ import annotations

from rpc.codec import Message

__all__ = ["Generic", "Method", "Q", "R"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Generic, TypeVar

    Q = TypeVar("Q", bound=Message)
    R = TypeVar("R", bound=Message)
else:
    Q = R = None

    class Generic:
        """Stands in for typing.Generic, whose import costs more than this package."""

        def __class_getitem__(cls, _):
            return cls


class Method(Generic[Q, R]):
    """One method of a service. Client, server or both may stream: see rpc/server.py for the handlers."""

    __slots__ = ("client_streams", "name", "request", "response", "server_streams", "service")

    def __init__(
        self,
        service: str,
        name: str,
        request: type[Q],
        response: type[R],
        client_streams: bool = False,
        server_streams: bool = False,
    ) -> None:
        self.service, self.name, self.request, self.response = service, name, request, response
        self.client_streams, self.server_streams = client_streams, server_streams

    @property
    def streams(self) -> bool:
        return self.client_streams or self.server_streams

    def __repr__(self) -> str:
        return f"{self.service}/{self.name}"
