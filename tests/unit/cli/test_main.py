"""The command as a whole: help, errors, exit codes, start-up, terminals."""

import errno
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.exits import ExitCode, exit_code
from cli.main import COMMANDS
from rpc.errors import Code
from tests.unit.cli.conftest import ROOT, Casemate, Host, Shim, spawn

NewShim = Callable[[], Shim]


def test_help_lists_every_command(casemate: Casemate) -> None:
    result = casemate("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert re.search(rf"^  {name} +\w", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(casemate: Casemate, name: str) -> None:
    result = casemate(name, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


def test_every_command_that_prints_data_has_json(casemate: Casemate) -> None:
    for words in [
        ("check",),
        ("ps",),
        ("logs",),
        ("trace",),
        ("gc",),
        ("config", "show"),
        ("config", "check"),
        ("image", "list"),
        ("image", "show"),
        ("image", "verify"),
    ]:
        assert "--json" in casemate(*words, "--help").stdout, words


@pytest.mark.parametrize(
    "words", [("nosuch",), ("ps", "--nosuch"), ("logs",), ("config", "nosuch"), ("trace", "a", "b")]
)
def test_wrong_usage_is_exit_code_2_on_standard_error(casemate: Casemate, words: tuple[str, ...]) -> None:
    result = casemate(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage:" in result.stderr


def test_no_command_shows_the_help(casemate: Casemate) -> None:
    result = casemate()
    assert result.exit_code == 2
    assert "Commands:" in result.stdout + result.stderr


def test_version_is_told(casemate: Casemate) -> None:
    result = casemate("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("casemate")


@pytest.mark.parametrize(
    ("code", "exit_"),
    [
        (Code.NOT_FOUND, 3),
        (Code.PERMISSION_DENIED, 4),
        (Code.CANCELLED, 130),
        (Code.INVALID_ARGUMENT, 1),
        (Code.INTERNAL, 1),
        (Code.UNKNOWN, 1),
    ],
)
def test_errors_have_exit_codes(code: Code, exit_: int) -> None:
    assert exit_code(code) == exit_


def test_documented_exit_codes_are_those_there_are() -> None:
    documented = {
        int(row.group(1))
        for row in re.finditer(r"^\| (\d+) \|", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    }
    assert documented == {int(code) for code in ExitCode}


def test_ps_imports_nothing_heavy(host: Path) -> None:
    code = "import sys\nfrom cli.main import app\ntry: app(['ps'])\nfinally: print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(said.stdout.splitlines()[-1].split())
    assert "cli.ps" in modules
    # pydantic is there all the same: typer needs it to read its arguments
    assert not modules & {
        "rich.console",
        "config.schema",
        "grpc",
        "libvirt",
        "asyncio",
        "images",
        "cli.check",
    }


def test_completion_completes_commands_and_pods(host: Path, pods: Host, new_shim: NewShim) -> None:
    pods.pod("default", "web-1", new_shim())
    pods.pod("default", "web-2", ended=True)

    def complete(line: str) -> list[str]:
        words = line.split(" ")
        # What the script of --show-completion bash sets before it calls the command.
        environment = os.environ | {
            "_CASEMATE_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        }
        code = "from cli.main import app; app(prog_name='casemate')"
        said = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        return said.stdout.split()

    assert complete("casemate c") == ["check", "config", "cdi"]
    assert complete("casemate logs web") == ["web-1", "web-2"]


# --- with and without a terminal ---


def on_terminal(*words: str) -> str:
    """What a terminal of 80 columns gets."""
    controller, terminal = pty.openpty()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")
    }
    process = spawn(
        *words,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=environment | {"TERM": "xterm-256color", "COLUMNS": "80"},
    )
    os.close(terminal)
    seen = b""
    try:
        while data := os.read(controller, 1 << 16):
            seen += data
    except OSError as error:
        if error.errno != errno.EIO:  # which says that the last writer has closed the terminal
            raise
    finally:
        os.close(controller)
    process.wait()
    return seen.decode()


def test_a_terminal_gets_colours_and_a_pipe_none(host: Path, pods: Host, new_shim: NewShim) -> None:
    pods.pod("default", "web", new_shim())
    terminal = on_terminal("ps")
    assert "\x1b[1m" in terminal
    process = spawn("ps", stdout=subprocess.PIPE, env=os.environ | {"TERM": "xterm-256color"})
    piped = process.communicate()[0].decode()
    assert "\x1b" not in piped
    assert re.sub(r"\x1b\[[0-9;]*m", "", terminal).replace("\r\n", "\n") == piped


def test_a_narrow_terminal_cuts_nothing(host: Path, pods: Host, new_shim: NewShim) -> None:
    pods.pod("default", "x" * 150, new_shim())
    assert "x" * 150 in on_terminal("ps").replace("\r\n", "")


def test_a_guest_cannot_colour_a_terminal(host: Path, pods: Host, new_shim: NewShim) -> None:
    directory = pods.pod("default", "web", new_shim())
    (directory / "console.log").write_bytes(b"\x1b]0;owned\x07\x1b[31m[bold]red[/bold]\n")
    assert on_terminal("logs", "web", "--console") == "[bold]red[/bold]\r\n"


def test_an_error_on_a_terminal_is_whole(host: Path) -> None:
    assert "no pod nosuch" in on_terminal("logs", "nosuch")


def test_json_is_ascii(casemate: Casemate, pods: Host, new_shim: NewShim) -> None:
    pods.pod("default", "web", new_shim(), image="\x1b[2Jü")
    output = casemate("ps", "--json").stdout
    assert output.isascii()
    assert "\x1b" not in output
    assert json.loads(output)[0]["image"] == "\x1b[2Jü"
