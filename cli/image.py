"""`casemate image`: build, list, show, verify, rm, gc; and the demo's OCI image.

Only turns words into calls of images/ and results into text; must not know how images are made or stored.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.exits import ExitCode
from cli.output import JsonOption, print_json, print_line, print_note, print_table
from config.load import load
from images.image import GuestImage
from images.kernel import KernelKind
from images.store import ImageStore, Listed
from images.variant import Variant
from rpc.errors import CasemateError

app = typer.Typer(no_args_is_help=True, help="Guest images: the kernel and root file system of the VMs.")

Json = Annotated[bool, JsonOption]
Reference = Annotated[str, typer.Argument(help="A name, or a digest of at least 6 digits.")]


def _store() -> ImageStore:
    """The store that the shims use: the configuration says where it is."""
    return ImageStore(Path(load().image_dir))


@app.command()
def build(
    name: Annotated[str, typer.Option(help="The name that the image gets in the store.")] = "default",
    kernel: Annotated[
        KernelKind | None,
        typer.Option(
            help="cloud: Debian's own. tuned: built for this, which takes minutes the first time. "
            "If not given, the kind that the image of that name has, or else cloud. "
            "generic, Debian's with drivers of all hardware, is that of --variant amd alone."
        ),
    ] = None,
    variant: Annotated[
        Variant | None,
        typer.Option(
            help="nvidia, amd: with the driver for that vendor's GPUs, for pods that are given some. The "
            "store has it as NAME-nvidia or NAME-amd, beside the image NAME."
        ),
    ] = None,
    suite: Annotated[str, typer.Option(help="The Debian suite it is made of.")] = "trixie",
    mirror: Annotated[str, typer.Option(help="A Debian mirror, instead of the one in the apt sources.")] = "",
    if_needed: Annotated[
        bool, typer.Option("--if-needed", help="Do nothing if the image there was made by this casemate.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build a guest image from Debian packages and this casemate's agent."""
    from images import builder

    store = _store()
    options = builder.Options(name=name, kernel=kernel, variant=variant, suite=suite, mirror=mirror)
    current = builder.current(store, options) if if_needed else None
    if current is not None:
        _print_built(current, {}, as_json)
        return
    built = builder.build(store, options, progress=print_note)
    _print_built(built.image, built.phases_s, as_json)


@app.command("list")
def list_images(as_json: Json = False) -> None:
    """List the images in the store."""
    listed = _store().list()
    if as_json:
        print_json([_summary(entry) for entry in listed])
        return
    print_table(("NAMES", "DIGEST", "SUITE", "KERNEL", "SIZE", "STATE"), [_row(entry) for entry in listed])


@app.command()
def show(reference: Reference = "default", as_json: Json = False) -> None:
    """Show what an image is made of."""
    image = _store().resolve(reference)
    about = image.manifest
    if as_json:
        print_json({"digest": image.digest, "directory": str(image.directory), **about})
        return
    print_line(f"digest        {image.digest}")
    print_line(f"directory     {image.directory}")
    of_variants = [key for key in ("variant", "driver") if key in about]
    for key in ("suite", "architecture", "kernel", "kernel_kind", "python", "crun", *of_variants, "cmdline"):
        print_line(f"{key:13} {about.get(key, '')}")
    for name, entry in about["files"].items():
        print_line(f"{name:13} {entry['bytes']} bytes, sha256:{entry['sha256']}")
    print_table(("PACKAGE", "VERSION"), list(about.get("packages", {}).items()))
    if tools := about.get("kernel_packages"):
        print_table(("THE KERNEL WAS BUILT WITH", "VERSION"), list(tools.items()))
    if packages := about.get("driver_packages"):
        print_table(("THE DRIVER IS MADE OF", "VERSION"), list(packages.items()))


@app.command()
def verify(
    references: Annotated[list[str] | None, typer.Argument(help="Names or digests; all if none.")] = None,
    as_json: Json = False,
) -> None:
    """Read every file of images and compare it with its digest. Ends with 1 if one is damaged."""
    store = _store()
    results = [_verify(store, wanted) for wanted in references or [entry.digest for entry in store.list()]]
    if as_json:
        print_json(results)
    else:
        for result in results:
            print_line(f"{result['image']}: {result['problem'] or 'ok'}")
    if any(result["problem"] for result in results):
        raise typer.Exit(ExitCode.FAILURE)


@app.command()
def rm(
    references: Annotated[list[str], typer.Argument(help="Names or digests.")],
    as_json: Json = False,
) -> None:
    """Remove images; of one with several names, only the name. One that is in use is an error."""
    store = _store()
    removed = [store.remove(reference) for reference in references]
    _print_removed(removed, [], as_json)


@app.command()
def gc(as_json: Json = False) -> None:
    """Remove images without a name that no pod uses."""
    collected = _store().gc()
    _print_removed(collected.removed, collected.in_use, as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Argument(help="Where to write the archive.")],
    suite: Annotated[str, typer.Option(help="The Debian suite it is made of.")] = "trixie",
    as_json: Json = False,
) -> None:
    """Write the demo's OCI image, a plain Debian with Python, as an archive for `ctr image import`."""
    from images import oci

    digest = oci.write_demo(output, suite=suite)
    if as_json:
        print_json({"reference": oci.DEMO, "digest": digest, "path": str(output)})
    else:
        print_line(f"{oci.DEMO} ({digest[:19]}) written to {output}")


def _verify(store: ImageStore, reference: str) -> dict[str, Any]:
    try:
        store.verify(store.resolve(reference), full=True)
    except CasemateError as error:
        return {"image": reference, "problem": str(error)}
    return {"image": reference, "problem": None}


def _summary(entry: Listed) -> dict[str, Any]:
    found: dict[str, Any] = {
        "digest": entry.digest,
        "names": list(entry.names),
        "problem": entry.problem or None,
    }
    if entry.image is not None:
        about = {key: entry.image.manifest.get(key) for key in ("suite", "kernel", "python")}
        found |= {"directory": str(entry.image.directory), "size_bytes": entry.image.size_bytes, **about}
    return found


def _row(entry: Listed) -> tuple[str, ...]:
    names, short = ", ".join(entry.names) or "-", entry.digest.removeprefix("sha256:")[:12]
    if entry.image is None:
        return names, short, "-", "-", "-", entry.problem
    about = entry.image.manifest
    size = f"{entry.image.size_bytes / 2**20:.1f} MiB"
    return names, short, str(about.get("suite", "-")), str(about.get("kernel", "-")), size, "ok"


def _print_built(image: GuestImage, phases_s: dict[str, float], as_json: bool) -> None:
    """phases_s is empty if the image was there already."""
    if as_json:
        print_json(
            {
                "name": image.name,
                "digest": image.digest,
                "directory": str(image.directory),
                "size_bytes": image.size_bytes,
                "built": bool(phases_s),
                "phases_s": phases_s,
            }
        )
        return
    state = f"built in {sum(phases_s.values()):.1f} s" if phases_s else "is current"
    print_line(f"guest image {image.name} {state}: sha256:{image.short}, {image.size_bytes / 2**20:.1f} MiB")


def _print_removed(
    removed: tuple[str, ...] | list[str], in_use: tuple[str, ...] | list[str], as_json: bool
) -> None:
    if as_json:
        print_json({"removed": list(removed), "in_use": list(in_use)})
        return
    for digest in removed:
        print_line(f"removed {digest}")
    for digest in in_use:
        print_line(f"in use, left alone: {digest}")
