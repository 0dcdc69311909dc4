"""What runs come to, in sections of text, tables and pictures: said once, written as Markdown or HTML.

Every number is a sample's, or stats.py's. A ratio stands only where the runs were interleaved; where they
were not, the refusal stands in its place. Runs of several machines stand one below the other, and beside each
other in the table of targets alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from bench import measures, stats, svg, targets
from bench.document import Document, Failure, Life, Trials
from bench.measures import MEASURES, MIB, RATE
from rpc.errors import CasemateError, printable
from shim.trace import MOST_WORDS

WORDS = 400  # letters of what somebody else said
DEEPEST = 3  # of phases within phases
TITLES = {
    "boot": "Start",
    "exec": "Exec",
    "delete": "End",
    "density": "Idle pods",
    "io": "Sequential reading",
    "files": "Root file systems",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Cells may hold `code` and **bold**, nothing else of Markdown."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """name is a file's, without its suffix."""

    name: str
    about: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """Pictures that belong side by side."""

    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """depth: 1 for a part of the page, 2 for a part of that."""

    title: str
    parts: tuple["str | Table | Picture | Row", ...]
    depth: int = 1


def sections(documents: Sequence[Document]) -> list[Section]:
    """documents must not be empty; of several of one kind and machine each has a section of its own."""
    machines = by_machine(documents)
    found = [Section("Targets", (targets_table({name: targets.judge(of) for name, of in machines.items()}),))]
    for name, of in machines.items():
        found += _of_machine(name, of, f"{_file_name(of[0].machine)}/" if of[0].machine else "")
    return found


COMPARED = (
    *(("boot", measures.RUN), ("density", measures.PSS), ("files", measures.FILES_READ)),
    *(("files", measures.FILES_WRITE), ("files", measures.FILES_WALK), ("files", measures.FILES_WALK_AGAIN)),
    *(("files", measures.FILES_MAKE),),
)
"""What a way to give a container its files is chosen by: kind of run, measure."""


def files_compared(documents: Sequence[Document]) -> tuple[str | Table, ...]:
    """Of one machine's runs, a column for each way whose root file system was looked at; none: empty."""
    newest = {one.kind: one for one in sorted(documents, key=lambda one: one.began_at)}
    if "files" not in newest:
        return ()
    found = newest["files"]
    rows = [("files by", *(" and ".join(way.files) or "-" for way in found.ways))]
    for kind, measure in COMPARED:
        about = MEASURES[measure]
        cells = [_beside(newest[kind], measure, way.name) if kind in newest else "-" for way in found.ways]
        rows.append((f"{about.text} ({about.unit})", *cells))
    tried = {one.way: f"{len(one.differences)} of {one.tried}" for one in found.trials}
    rows.append(("expected by programs, and not so", *(tried.get(way.name, "-") for way in found.ways)))
    about_it = (
        "Medians, and their ratio to the first column's, of the runs above. docs/architecture.md says which "
        "way a pod gets, why, and what other ways there would have been."
    )
    return (
        about_it,
        Table(("", *(way.name for way in found.ways)), tuple(rows)),
    )


def _beside(document: Document, measure: str, way: str) -> str:
    values = document.values(way, measure)
    if not values:
        return "-"
    about = MEASURES[measure]
    median = about.show(stats.summary(values, most_is_best=about.unit == RATE).median)
    compared = ratio(document, measure, way)
    return f"{median}, x {compared}" if compared and not compared.startswith("refused") else median


def by_machine(documents: Sequence[Document]) -> dict[str, list[Document]]:
    """The runs of each machine, by its name and what accelerated its guests, in the order of a page."""
    accel = {one.machine: one.accel.accel.upper() for one in documents if one.accel}
    found: dict[str, list[Document]] = {}
    for one in sorted(documents, key=lambda one: (one.machine, list(TITLES).index(one.kind), one.began_at)):
        said = accel.get(one.machine, "")
        name = f"{one.machine} ({said})" if one.machine and said else one.machine or said or "machine"
        found.setdefault(name, []).append(one)
    return found


def _of_machine(title: str, documents: Sequence[Document], place: str) -> Iterator[Section]:
    """place: what its pictures' names begin with."""
    yield Section(title[0].upper() + title[1:], tuple(_machine(documents)))
    kinds = [one.kind for one in documents]
    for number, document in enumerate(documents):
        earlier = kinds[:number].count(document.kind)
        name = place + document.kind + (f"-{earlier + 1}" if earlier else "")
        yield Section(TITLES[document.kind], tuple(_run(document, name)), 2)
    if compared := files_compared(documents):
        yield Section("How the root-file-system ways compare", compared, 2)
    files = max(documents, key=lambda one: one.began_at).files
    if files:
        rows = [*files.items(), ("all", sum(files.values()))]
        table = Table(("file", "MiB"), tuple((name, f"{size / MIB:.1f}") for name, size in rows))
        yield Section("The guest image", (table,), 2)


def _machine(documents: Sequence[Document]) -> Iterator[str]:
    """Of each different host or set of versions a paragraph: a machine may have changed between runs."""
    yield from dict.fromkeys(accelerated(document) for document in documents)
    said: dict[str, list[Document]] = {}
    for one in documents:
        host = one.host
        machine = (
            f"{host['cpus']} CPUs ({host['cpu_model']}), {host['memory_bytes'] / (1 << 30):.0f} GiB, "
            f"Linux {host['kernel']}, cgroups {host['cgroups']}. "
            + ", ".join(f"{name} {version}" for name, version in one.versions.items())
            + "."
        )
        said.setdefault(machine, []).append(one)
    for machine, runs in said.items():
        day = datetime.fromtimestamp(min(one.began_at for one in runs), UTC).date()
        most = max(max(one.host["load"], one.host["load_after"]) for one in runs)
        yield f"{machine} Measured on {day}, the load at most {most:.1f} (these runs' own included)."


def accelerated(document: Document) -> str:
    """Which acceleration the guests had."""
    way = document.accel
    if way is None:
        return "No runtime of this run says what accelerates its guests."
    if way.accel == "tcg":
        return (
            f"**The guests ran under TCG**, QEMU's emulation ({way.accel_reason}): what a guest does takes "
            "many times longer than under KVM."
        )
    return f"The guests ran under {way.accel.upper()} ({way.accel_reason})."


def targets_table(machines: Mapping[str, Sequence[targets.Judged]]) -> Table:
    """Every target, what measures it, the most or the least it may be, and the verdict on each machine."""
    rows = []
    for of_one in zip(*machines.values(), strict=True):
        target = of_one[0].target
        said = ", ".join(
            f"{value:g} {target.unit} ({accel.upper()})" for accel, value in target.limits.items()
        )
        limits = f"{target.bound.value} {said}" if said else "-"
        command = next((f"`{one.found.command}`" for one in of_one if one.found and one.found.command), "-")
        rows.append((target.text, command, limits, *map(_verdict, of_one)))
    return Table(("", "measured by", "target", *machines), tuple(rows))


def _verdict(one: targets.Judged) -> str:
    verdict = f"**{one.verdict.value}**" if one.verdict is targets.Verdict.MISSED else one.verdict.value
    if one.reason:
        verdict += f": {one.reason}"
    if one.found is None:
        return verdict
    digits = 3 if one.found.value < 0.1 else 2
    return f"{one.found.value:.{digits}f} {one.target.unit} ({one.found.detail}), {verdict}"


def _run(document: Document, name: str) -> Iterator[str | Table | Picture | Row]:
    yield f"`{document.command}`"
    yield conditions(document)
    yield table(document)
    if any(sample < stats.FEW for sample in _counts(document)):
        yield f"With fewer than {stats.FEW} samples p95 and p99 are little more than the worst one."
    if document.failures:
        yield f"**{len(document.failures)} of those that started at once failed**, and are in no line above:"
        yield Table(("", "round", "in its own words"), tuple(map(_failure, document.failures)))
    yield from _strips(document, name)
    if document.trials:
        yield "What programs expect of a local file system, each thing tried (bench/trials.py):"
        yield Table(("", "tried", "not so"), tuple(map(_trials, document.trials)))
    if document.processes:
        yield "Of which processes, divided by the pods:"
        yield _shares(document)
        bars: dict[str, dict[str, float]] = {}
        for share in document.processes:
            bars.setdefault(share.way, {})[share.name] = share.pss_bytes / MIB
        about = "PSS of one of the idle pods, by process"
        yield Picture(f"{name}-processes", about, svg.stacks(about, "MiB", bars))
    if document.lives:
        yield (
            "The runs of the median time, phase by phase on one scale, from the client's exec: "
            "grey the client, blue the host, green the guest. `casemate trace` draws any pod's."
        )
        yield Row(tuple(_waterfalls(document.lives, name)))
        if any(life.spans for life in document.lives):
            yield "The same in milliseconds. Phases overlap; a part of another one stands behind a dot."
            yield phases_table(document.lives)


def conditions(document: Document) -> str:
    """How it was measured, in one paragraph."""
    options = document.options
    rounds = len({sample.round for sample in document.samples})
    said = [f"{rounds} rounds of {', '.join(way.name for way in document.ways)}, in turns"]
    if options.get("crowd", 1) > 1:
        said.append(f"then {options['crowd']} clients at once, {options['crowds']} times each")
    if options.get("parallel", 1) > 1:
        said.append(f"{options['parallel']} clients at once")
    if "pods" in options:
        said.append(f"{options['pods']} pods up, idle for {options['settle_s']:g} s")
    if "size_bytes" in options:
        said.append(f"files of {options['size_bytes'] // MIB} MiB that the guest has not seen before")
    for way in document.ways:
        if way.sources:
            size = f"{way.vcpus} vCPU, {way.memory_bytes // MIB} MiB"
            files = f", files by {' and '.join(way.files)}" if way.files else ""
            said.append(
                f"machines of {way.name}: {' and '.join(way.sources)} ({size}, {way.accel.upper()}{files})"
            )
    return "; ".join(said) + f". Ratios are to {document.reference}, with their 95 % confidence interval."


def table(document: Document) -> Table:
    """Of every measure and way: median, p95, p99, least to most, ratio to the first way.

    95 and 99 of 100 samples are no worse than p95 and p99, which are the slow end of a rate, too.
    """
    rows = []
    for measure in document.measures():
        about = MEASURES[measure]
        text = f"{about.text} ({about.unit})"
        for way in document.ways:
            values = document.values(way.name, measure)
            if not values:
                continue
            found = stats.summary(values, most_is_best=about.unit == RATE)
            shown = [about.show(value) for value in (found.median, found.p95, found.p99)]
            spread = f"{about.show(found.least)} to {about.show(found.most)}"
            rows.append((text, way.name, *shown, spread, ratio(document, measure, way.name)))
            text = ""
    return Table(("", "", "median", "p95", "p99", "least to most", "ratio"), tuple(rows))


def ratio(document: Document, measure: str, way: str) -> str:
    """A ratio with its interval; the reason in its place where there is none to be had."""
    if way == document.reference or not document.values(document.reference, measure):
        return ""
    try:
        found = stats.ratio(document.samples, measure, way, document.reference)
    except CasemateError as error:
        return f"refused: {error.details or error.brief}"
    digits = 2 if found.value >= 1 else 3
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _trials(found: Trials) -> tuple[str, str, str]:
    return (found.way, str(found.tried), "; ".join(map(_words, found.differences)))


def _words(text: str) -> str:
    """What a guest or a client said, as code."""
    return f"`{printable(' '.join(text.split()), WORDS).replace('`', chr(39))}`"


def _failure(failure: Failure) -> tuple[str, str, str]:
    return (failure.way, str(failure.round), _words(failure.text))


def _counts(document: Document) -> Iterator[int]:
    for measure in document.measures():
        for way in document.ways:
            if count := len(document.values(way.name, measure)):
                yield count


def _strips(document: Document, name: str) -> Iterator[Picture]:
    """A picture for each unit."""
    units: dict[str, list[svg.Group]] = {}
    for measure in document.measures():
        values = {way.name: document.values(way.name, measure) for way in document.ways}
        there = {way: found for way, found in values.items() if found}
        medians = {way: stats.summary(found).median for way, found in there.items()}
        group = svg.Group(MEASURES[measure], there, medians)
        units.setdefault(group.measure.unit, []).append(group)
    for number, (unit, groups) in enumerate(units.items()):
        about = f"{TITLES[document.kind]}: every sample and the medians" + (f" ({unit})" if number else "")
        yield Picture(f"{name}-{_file_name(unit)}" if number else name, about, svg.strips(about, groups))


def _shares(document: Document) -> Table:
    rows = [
        (share.way, share.name, f"{share.pss_bytes / MIB:.1f}", f"{share.guest_ram_bytes / MIB:.1f}")
        for share in document.processes
    ]
    return Table(("", "process", "PSS (MiB)", "of it guest RAM"), tuple(rows))


def _waterfalls(lives: Sequence[Life], name: str) -> Iterator[Picture]:
    most_s = max(life.gone_s - life.exec_s for life in lives)
    for life in lives:
        about = f"a container's life: {life.way}"
        yield Picture(f"{name}-waterfall-{_file_name(life.way)}", about, svg.waterfall(life, most_s))


def phases_table(lives: Sequence[Life]) -> Table:
    """How long each phase took in each life that has any, each below the one that it is a part of; in ms."""
    told = [life for life in lives if life.spans]
    names = {span.name for life in told for span in life.spans}
    begins: dict[tuple[str, str], float] = {}
    took: dict[tuple[str, str, str], float] = {}
    for life in told:
        for span in life.spans:
            # A guest names its own spans, and may say anything.
            parent = span.parent if span.parent in names and span.parent != span.name else ""
            began_s = span.start_s - life.exec_s
            begins[parent, span.name] = min(begins.get((parent, span.name), began_s), began_s)
            whole = (life.way, parent, span.name)
            took[whole] = took.get(whole, 0.0) + span.end_s - span.start_s
    rows: list[tuple[str, ...]] = []

    def below(above: str, depth: int) -> None:
        for parent, name in sorted((key for key in begins if key[0] == above), key=lambda key: begins[key]):
            seconds = [took.get((life.way, parent, name)) for life in told]
            shown = ["" if one is None else f"{1000 * one:.0f}" for one in seconds]
            rows.append(("· " * depth + printable(name, MOST_WORDS), *shown))
            if depth < DEEPEST:
                below(name, depth + 1)

    below("", 0)
    ends = [f"{1000 * (life.exit_s - life.exec_s):.0f}" for life in told]
    return Table(("", *(life.way for life in told)), (*rows, ("ctr, from exec to exit", *ends)))


def _file_name(way: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in way)


def plain(text: str) -> str:
    """Without the marks of Markdown, for a terminal or a picture."""
    return text.replace("`", "").replace("**", "")
