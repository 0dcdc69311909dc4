"""The part of crun that the agent relies on, without isolation: processes wait, start, are left behind.

It takes crun's arguments and keeps its promises: what it starts outlives it, with its standard streams;
the pid is in the pid file; errors are in the log and in the exit status.
"""

import json
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def fail(log: str, message: str) -> None:
    with open(log, "a") as file:
        file.write(json.dumps({"msg": message, "level": "error"}) + "\n")
    sys.exit(1)


def leave_behind(process: dict[str, Any], pid_file: str, fifo: Path | None) -> int:
    waiting = None if fifo is None else os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    pid = os.fork()
    if pid == 0:
        if waiting is not None:
            select.select([waiting], [], [])
            os.read(waiting, 1)
        os.execvpe(process["args"][0], process["args"], {"PATH": os.environ["PATH"]})
    Path(pid_file).write_text(str(pid))
    return pid


def main() -> None:
    words = iter(sys.argv[1:])
    options = {}
    names = []
    for word in words:
        if word in ("--root", "--bundle", "--pid-file", "--process", "--resources", "--console-socket"):
            options[word] = next(words)
        elif word.startswith("--log="):
            options["--log"] = word.removeprefix("--log=")
        elif not word.startswith("--"):
            names.append(word)
    command, name = names
    state = Path(options["--root"]) / name
    if command == "create":
        state.mkdir(parents=True)
        os.mkfifo(state / "exec.fifo")
        spec = json.loads(Path(options["--bundle"], "config.json").read_text())
        if "fail" in spec["annotations"]:
            fail(options["--log"], spec["annotations"]["fail"])
        pid = leave_behind(spec["process"], options["--pid-file"], state / "exec.fifo")
        (state / "pid").write_text(str(pid))
    elif command == "start":
        with (state / "exec.fifo").open("w") as waited_for:
            (state / "exec.fifo").unlink()
            waited_for.write("\0")
    elif command == "exec":
        leave_behind(json.loads(Path(options["--process"]).read_text()), options["--pid-file"], None)
    elif command in ("pause", "resume"):
        (state / command).touch()
    elif command == "update":
        (state / "resources").write_text(Path(options["--resources"]).read_text())
    elif command == "delete" and state.exists():
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((state / "pid").read_text()), signal.SIGKILL)
        for path in state.iterdir():
            path.unlink()
        state.rmdir()


main()
