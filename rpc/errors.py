"""The one error family of casemate, and the status codes it maps to on the wire.

Lowest module of all: it imports nothing of ours, so that the guest agent, the shim and the
command line raise and catch the same types. It must not know about ttrpc, gRPC or containerd.
"""

from enum import IntEnum


class Code(IntEnum):
    """google.rpc.Code, as ttrpc and gRPC put it into a Status."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class CasemateError(Exception):
    """Something failed that a person must be told about.

    brief names the thing and what happened to it, on one line. details holds what was seen
    (another program's own words, the console's last lines). hint says what to do about it.
    """

    code = Code.UNKNOWN

    def __init__(
        self,
        brief: str,
        details: str | None = None,
        hint: str | None = None,
        *,
        code: Code | None = None,
    ) -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = details
        self.hint = hint
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        text = self.brief
        if self.details:
            text += f": {self.details}"
        if self.hint:
            text += f" (hint: {self.hint})"
        return text


class Cancelled(CasemateError):
    code = Code.CANCELLED


class InvalidArgument(CasemateError):
    code = Code.INVALID_ARGUMENT


class DeadlineExceeded(CasemateError):
    code = Code.DEADLINE_EXCEEDED


class NotFound(CasemateError):
    code = Code.NOT_FOUND


class AlreadyExists(CasemateError):
    code = Code.ALREADY_EXISTS


class PermissionDenied(CasemateError):
    code = Code.PERMISSION_DENIED


class ResourceExhausted(CasemateError):
    code = Code.RESOURCE_EXHAUSTED


class FailedPrecondition(CasemateError):
    code = Code.FAILED_PRECONDITION


class Unimplemented(CasemateError):
    code = Code.UNIMPLEMENTED


class Internal(CasemateError):
    code = Code.INTERNAL


class Unavailable(CasemateError):
    code = Code.UNAVAILABLE


class Disconnected(Unavailable):
    """The connection itself is gone. A peer's answer is never this one: it may say UNAVAILABLE and live."""


class DataLoss(CasemateError):
    code = Code.DATA_LOSS


_BY_CODE = {kind.code: kind for kind in CasemateError.__subclasses__()}


def from_code(code: int, brief: str) -> CasemateError:
    """The error that a peer's status stands for; a code that nobody declared is UNKNOWN."""
    try:
        known = Code(code)
    except ValueError:
        known = Code.UNKNOWN
    return _BY_CODE.get(known, CasemateError)(brief, code=known)


def printable(words: str, most: int | None = None, *, keeping: str = "") -> str:
    """Somebody else's words for a log or a terminal: so many, and "?" for what a terminal would obey."""
    return "".join(c if c.isprintable() or c in keeping else "?" for c in words[:most])
