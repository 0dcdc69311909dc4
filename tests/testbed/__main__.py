"""`make testbed`, `testbed-run`, `testbed-shell`, `bench-testbed`: build the bed, and use instances of it."""

import argparse
import shlex
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from bench import report
from bench.machine import commit
from images import builder
from images.tuned import kernel as tuned
from rpc.errors import CasemateError, NotFound
from scripts import demo_image, product
from scripts.host import CHECKOUT, main_guard, require_root, say
from scripts.host import run as run_command
from tests.testbed import cache, debian, devices, installation, kernel, machine

TEMPLATE = ("casemate", "template", "build")
PAGE = CHECKOUT / "docs/performance.md"
SAMPLES = PAGE.with_suffix("") / "test-bed"
# All that `make bench` measures: some hundreds of starts, of seconds each.
BENCH = ("--machine=test bed", "--output=/share", "--rounds=4")
BENCH_LIMIT_S = 5400.0


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


def kept(_: argparse.Namespace) -> int:
    """Whether build() takes no longer than minutes. What is missing is said."""
    missing = debian.missing()
    if kernel.missing():
        missing.append("kernel")
    if not tuned.kept(builder.Options().suite):
        missing.append("guests' tuned kernel")
    if missing:
        say(f"testbed: not built here: {', '.join(missing)}; `make testbed` builds them, in 40 minutes")
    return 1 if missing else 0


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


def bench(arguments: argparse.Namespace) -> int:
    """Measure in an instance, keep the samples beside those of other machines, and write the page of all."""
    archive, _ = demo_image.archive()
    command = [str(product.DEFAULT_PREFIX / "bin/python3"), "-BI", "-m", "bench", "measure", *BENCH]
    command += [f"--commit={commit(CHECKOUT)}", f"--archive={archive}", *arguments.arguments]
    bed = ensure()
    with tempfile.TemporaryDirectory(prefix="casemate-testbed-bench-", dir="/var/tmp") as name:
        share = Path(name)
        code = machine.run(bed, command, machine.Shape(limit_s=arguments.limit_s, share=share))
        done = sorted(share.glob("*.json"))
        if code and done:
            say(f"exit code {code}; kept is what was measured until then")
        SAMPLES.mkdir(parents=True, exist_ok=True)
        beside = arguments.beside and f"-{arguments.beside}"
        for path in done:
            shutil.copyfile(path, SAMPLES / f"{path.stem}{beside}{path.suffix}")
    if done:
        page(arguments)
    return code


def page(_: argparse.Namespace) -> int:
    for path in report.renew(PAGE):
        say(f"wrote {path}")
    return 0


def shape(arguments: argparse.Namespace, *, shell: bool = False) -> machine.Shape:
    share = Path(arguments.share).resolve() if arguments.share else None
    if share and not share.is_dir():
        raise NotFound(f"SHARE={share}: no such directory")
    return machine.Shape(
        *(arguments.cpus, arguments.memory_mib, arguments.limit_s, share, shell),
        devices=devices.TOPOLOGIES[arguments.devices] if arguments.devices else None,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make testbed", description=__doc__)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("build").set_defaults(do=build)
    commands.add_parser("kept").set_defaults(do=kept)
    for name, do in {"run": run, "shell": shell}.items():
        command = commands.add_parser(name)
        command.set_defaults(do=do)
        command.add_argument("--share", default="", help="a directory that the bed sees as /share")
        command.add_argument("--cpus", type=int, default=machine.CPUS)
        command.add_argument("--memory-mib", type=int, default=machine.MEMORY_MIB)
        command.add_argument("--limit-s", type=float, default=machine.LIMIT_S)
        command.add_argument("--devices", default="", choices=["", *devices.TOPOLOGIES], metavar="TOPOLOGY")
        if do is run:
            command.add_argument("script")
            command.add_argument("arguments", nargs=argparse.REMAINDER)
    command = commands.add_parser("bench", epilog="the rest: arguments of `python -m bench measure`")
    command.set_defaults(do=bench)
    command.add_argument("--limit-s", type=float, default=BENCH_LIMIT_S)
    command.add_argument(
        "--beside", default="", metavar="WORD", help="keep the samples as KIND-WORD, beside KIND's"
    )
    commands.add_parser("page").set_defaults(do=page)
    arguments, rest = parser.parse_known_args()
    if arguments.do is bench:
        arguments.arguments = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    # As an interrupt does: an instance ends with whoever asked for it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if arguments.do is not page:
            require_root("testbed")
        code: int = arguments.do(arguments)
    except CasemateError as error:
        return main_guard(error)
    return code


if __name__ == "__main__":
    sys.exit(main())
