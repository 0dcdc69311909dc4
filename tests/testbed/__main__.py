"""`make testbed`, `make testbed-run`, `make testbed-shell`: build the bed, and use instances of it."""

import argparse
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from rpc.errors import CasemateError, NotFound
from scripts.host import main_guard, require_root, say
from scripts.host import run as run_command
from tests.testbed import cache, debian, installation, kernel, machine

TEMPLATE = ("casemate", "template", "build")


def ensure() -> machine.Bed:
    """The bed with this checkout installed in it: built where it is not yet, quick where it is."""
    installed = machine.Bed(debian.host(), kernel.ensure(), installation.disk())

    def build(target: Path) -> None:
        disk = target / installed.disk.name
        run_command(["cp", "--sparse=always", installed.disk, disk])
        bed = replace(installed, disk=disk)
        if code := machine.run(bed, TEMPLATE, machine.Shape(kept=True)):
            raise CasemateError(f"exit code {code} in the test bed from: {shlex.join(TEMPLATE)}")

    # a template is of a CPU, too
    recipe = [installed.disk.parent.name, installed.kernel.parent.name, machine.CPU, *TEMPLATE]
    return replace(installed, disk=cache.entry("template", recipe, build) / installed.disk.name)


def build(_: argparse.Namespace) -> int:
    bed = ensure()
    say(f"testbed: ready: {bed.disk.parent}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    script = Path(arguments.script)
    if not script.is_file():
        raise NotFound(f"SCRIPT={script}: no such file")
    first = script.read_bytes()[:2]
    program = [] if first == b"#!" else ["bash"]
    command = [*program, f"/exchange/{script.name}", *arguments.arguments]
    return machine.run(ensure(), command, shape(arguments), [script])


def shell(arguments: argparse.Namespace) -> int:
    columns, lines = shutil.get_terminal_size()
    prompt = f"stty rows {lines} columns {columns}; exec bash --login"
    return machine.run(ensure(), ["bash", "-c", prompt], shape(arguments, shell=True))


def shape(arguments: argparse.Namespace, *, shell: bool = False) -> machine.Shape:
    share = Path(arguments.share).resolve() if arguments.share else None
    if share and not share.is_dir():
        raise NotFound(f"SHARE={share}: no such directory")
    return machine.Shape(arguments.cpus, arguments.memory_mib, arguments.limit_s, share, shell)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make testbed", description=__doc__)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("build").set_defaults(do=build)
    for name, do in {"run": run, "shell": shell}.items():
        command = commands.add_parser(name)
        command.set_defaults(do=do)
        command.add_argument("--share", default="", help="a directory that the bed sees as /share")
        command.add_argument("--cpus", type=int, default=machine.CPUS)
        command.add_argument("--memory-mib", type=int, default=machine.MEMORY_MIB)
        command.add_argument("--limit-s", type=float, default=machine.LIMIT_S)
        if do is run:
            command.add_argument("script")
            command.add_argument("arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    try:
        require_root("testbed")
        code: int = arguments.do(arguments)
    except CasemateError as error:
        return main_guard(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
