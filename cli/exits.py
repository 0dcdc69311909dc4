"""The exit codes of `casemate`, declared once; docs/cli.md explains them to scripts."""

from enum import IntEnum

from rpc.errors import Code


class ExitCode(IntEnum):
    OK = 0
    FAILURE = 1  # it was tried and failed, or the host or the config is not fit
    USAGE = 2  # the command line itself is wrong
    NOT_FOUND = 3  # no such pod, image, trace ...
    NOT_PERMITTED = 4  # needs root
    INTERRUPTED = 130  # Ctrl-C


_BY_CODE = {
    Code.NOT_FOUND: ExitCode.NOT_FOUND,
    Code.PERMISSION_DENIED: ExitCode.NOT_PERMITTED,
    Code.CANCELLED: ExitCode.INTERRUPTED,
}


def exit_code(code: Code) -> ExitCode:
    """The exit code for an error that no command has handled."""
    return _BY_CODE.get(code, ExitCode.FAILURE)
