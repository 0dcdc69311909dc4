"""`casemate bench`: containers of several runtimes, measured in turns; and the report of what was measured.

Only turns words into calls of bench/ and results into text: it measures and decides nothing.
"""

from pathlib import Path
from typing import Annotated

import typer

from cli.output import JsonOption, print_json, print_line, print_note, print_table
from rpc.errors import InvalidArgument

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure containers of several runtimes against each other.",
)

Runtimes = Annotated[
    list[str] | None,
    typer.Option(
        "--runtime",
        metavar="[LABEL=]NAME[@CHECKOUT]",
        help="Again for each: runc, crun, casemate, casemate-boot (never restored), casemate-node (beside "
        "casemated), casemate-9p and casemate-virtiofs (how files come), casemate-tuned and "
        "casemate-tuned-boot (the guest image named tuned), kata, or containerd's name of a runtime. Ratios "
        "are to the first. CHECKOUT: another checkout of casemate. Default: runc, casemate.",
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="How often each runtime has its turn.")]
Parallel = Annotated[int, typer.Option(min=1, max=200, help="So many clients at once in each turn.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write every sample to a file, for `report`."),
]
Containerd = Annotated[
    Path | None,
    typer.Option(metavar="DIRECTORY", help="Where containerd, ctr and its shims are, if not on the PATH."),
]
Archive = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="An OCI archive to run instead of the demo's image: with true, echo, cat, sleep and python3.",
    ),
]
Machine = Annotated[str, typer.Option(metavar="NAME", help="What a report shall call this machine.")]
Json = Annotated[bool, JsonOption]


@app.command()
def boot(
    runtime: Runtimes = None,
    rounds: Rounds = 10,
    parallel: Annotated[
        int, typer.Option(min=1, max=200, help="After those that start alone, so many start at once, twice.")
    ] = 1,
    output: Output = None,
    containerd: Containerd = None,
    archive: Archive = None,
    machine: Machine = "",
    as_json: Json = False,
) -> None:
    """From the client's exec to the first byte of output, to its exit, to nothing left."""
    _run(
        "boot",
        runtime,
        output,
        as_json,
        rounds=rounds,
        crowd=parallel,
        containerd=containerd,
        archive=archive,
        machine=machine,
    )


@app.command("exec")
def execute(
    runtime: Runtimes = None,
    rounds: Rounds = 10,
    parallel: Parallel = 1,
    output: Output = None,
    containerd: Containerd = None,
    archive: Archive = None,
    machine: Machine = "",
    as_json: Json = False,
) -> None:
    """A second process in a container that runs already."""
    _run(
        "exec",
        runtime,
        output,
        as_json,
        rounds=rounds,
        parallel=parallel,
        containerd=containerd,
        archive=archive,
        machine=machine,
    )


@app.command()
def delete(
    runtime: Runtimes = None,
    rounds: Rounds = 10,
    output: Output = None,
    containerd: Containerd = None,
    archive: Archive = None,
    machine: Machine = "",
    as_json: Json = False,
) -> None:
    """Deletion of a task that has ended; and from KILL of one that runs to nothing left."""
    _run(
        "delete",
        runtime,
        output,
        as_json,
        rounds=rounds,
        containerd=containerd,
        archive=archive,
        machine=machine,
    )


@app.command()
def floor(
    rounds: Annotated[int, typer.Option(min=2, help="How often each way has its turn.")] = 10,
    as_json: Json = False,
) -> None:
    """What libvirt costs a restored start, beside the same QEMU started by hand."""
    from dataclasses import asdict

    from bench import floor as measuring
    from config.load import load

    rows = measuring.measure(load(), rounds)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows]})
        return
    cells = [
        [
            measuring.STEPS[row.step],
            "-" if row.by_hand_s is None else f"{row.by_hand_s:.3f}",
            f"{row.libvirt_s:.3f}",
            "-"
            if row.ratio is None
            else f"{row.ratio.value:.2f} ({row.ratio.low:.2f} to {row.ratio.high:.2f})",
        ]
        for row in rows
    ]
    print_table(["STEP", "BY HAND (S)", "LIBVIRT (S)", "RATIO"], cells)


@app.command()
def density(
    runtime: Runtimes = None,
    pods: Annotated[int, typer.Option(min=1, max=1000, help="How many are up at once.")] = 10,
    settle: Annotated[
        float, typer.Option(min=0, max=3600, help="Seconds that they are left alone before they are weighed.")
    ] = 5.0,
    rounds: Rounds = 3,
    output: Output = None,
    containerd: Containerd = None,
    archive: Archive = None,
    machine: Machine = "",
    as_json: Json = False,
) -> None:
    """The memory of idle pods: PSS of all their processes, alone and as one of many; what guests use."""
    _run(
        "density",
        runtime,
        output,
        as_json,
        rounds=rounds,
        pods=pods,
        settle_s=settle,
        containerd=containerd,
        archive=archive,
        machine=machine,
    )


@app.command("io")
def read(
    runtime: Runtimes = None,
    size: Annotated[
        int, typer.Option(min=1, max=65536, metavar="MIB", help="Size of the files, in MiB.")
    ] = 64,
    rounds: Rounds = 5,
    output: Output = None,
    containerd: Containerd = None,
    archive: Archive = None,
    machine: Machine = "",
    as_json: Json = False,
) -> None:
    """Sequential reading: the image's files, a volume's, a block device. TCP to the host and back."""
    from bench.measures import MIB

    size_bytes = size * MIB
    _run(
        "io",
        runtime,
        output,
        as_json,
        rounds=rounds,
        size_bytes=size_bytes,
        containerd=containerd,
        archive=archive,
        machine=machine,
    )


@app.command("files")
def behave(
    runtime: Runtimes = None,
    size: Annotated[
        int, typer.Option(min=1, max=65536, metavar="MIB", help="Size of the file to be read, in MiB.")
    ] = 64,
    rounds: Rounds = 5,
    output: Output = None,
    containerd: Containerd = None,
    archive: Archive = None,
    machine: Machine = "",
    as_json: Json = False,
) -> None:
    """The root file system: reading, writing, walking, making files; what programs expect and do not find.

    casemate-9p and casemate-virtiofs compare the two ways in which files come to a guest.
    """
    from bench.measures import MIB

    _run(
        "files",
        runtime,
        output,
        as_json,
        rounds=rounds,
        size_bytes=size * MIB,
        containerd=containerd,
        archive=archive,
        machine=machine,
    )


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="What the other commands wrote with --output.")],
    page: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page of Markdown, and its pictures beside it."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one page of HTML with everything in it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The targets, reached and missed; and pages with tables, every sample, and waterfalls side by side."""
    from bench import document, targets
    from bench import report as writer
    from bench.page import by_machine, targets_table

    documents = [document.read(file) for file in files]
    if page is not None:
        for path in writer.write_page(documents, page):
            print_note(f"wrote {path}")
    if html is not None:
        html.write_text(writer.html(documents))
        print_note(f"wrote {html}")
    judged = {name: targets.judge(of) for name, of in by_machine(documents).items()}
    if as_json:
        print_json(
            [
                {
                    "machine": machine,
                    "target": one.target.name,
                    "text": one.target.text,
                    "unit": one.target.unit,
                    one.target.bound.value.replace(" ", "_"): dict(one.target.limits),
                    "measured": one.found.value if one.found else None,
                    "detail": one.found.detail if one.found else None,
                    "accel": one.found.accel if one.found else None,
                    "verdict": one.verdict.value,
                    "reason": one.reason or None,
                }
                for machine, of_one in judged.items()
                for one in of_one
            ]
        )
        return
    _print_table(targets_table(judged))


def _run(
    kind: str, runtimes: list[str] | None, output: Path | None, as_json: bool, **options: object
) -> None:
    from bench import document, page, suite
    from rpc.errors import printable

    wanted = suite.Options(ways=tuple(runtimes or suite.default_ways()), **options)  # type: ignore[arg-type]
    try:
        wanted.check()
    except InvalidArgument as error:
        raise typer.BadParameter(str(error)) from None
    (measured,) = suite.run([kind], wanted, print_note)
    if output is not None:
        document.write(measured, output)
        print_note(f"wrote {output}")
    if as_json:
        print_json(measured.to_json())
        return
    print_line(page.plain(page.accelerated(measured)))
    print_line(page.plain(page.conditions(measured)))
    _print_table(page.table(measured))
    for one in measured.trials:
        print_line(f"{one.way}: {len(one.differences)} of {one.tried} things are not as programs expect")
        for words in one.differences:
            print_line(f"  {printable(words, page.WORDS)}")


def _print_table(table: "page.Table") -> None:
    from bench import page

    print_table(table.head, [[page.plain(cell) for cell in row] for row in table.rows])


TYPE_CHECKING = False
if TYPE_CHECKING:
    from bench import page
