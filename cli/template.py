"""`casemate template`: build, list, show, rm: the saved machines that pods are restored from.

Only turns words into calls of shim/ and results into text; must not know how a template is made or stored.
"""

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.output import JsonOption, print_json, print_line, print_note, print_table
from config.load import load
from config.settings import Profile, Settings
from rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from shim.paths import run_dir
from shim.vm.template import Template, TemplateStore, last_used
from shim.vm.template import load as load_template

app = typer.Typer(no_args_is_help=True, help="Templates: machines that were booted once and are restored.")

Json = Annotated[bool, JsonOption]
Key = Annotated[str, typer.Argument(help="A key, or as many of its digits as tell it from others.")]


def _store() -> TemplateStore:
    return TemplateStore(Path(load().template_dir), run_dir() / "cache" / "templates")


@app.command()
def build(
    profile: Annotated[str, typer.Option(help="The profile whose pods it is for.")] = "",
    tenant: Annotated[
        str, typer.Option(help="The namespace it is for, where the profile keeps tenants apart.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Make the template of a profile now, so that its first pod is restored already.

    Does nothing where there is one. What pods ask by annotation is another shape, with a template of its own.
    """
    settings = load()
    name = profile or settings.default_profile
    if name not in settings.profiles:
        raise InvalidArgument(f"no profile {name}", hint=f"there are {', '.join(sorted(settings.profiles))}")
    wanted = settings.profiles[name]
    if wanted.template == "off":
        raise FailedPrecondition(
            f'profile {name} has template = "off"', hint="its pods are booted, they would not use one"
        )
    if bool(tenant) != (wanted.template == "tenant"):
        raise InvalidArgument(
            f'profile {name} has template = "{wanted.template}"',
            hint='--tenant goes with template = "tenant", and only with it',
        )
    before = {template.key for template in _store().list()}
    print_note(f"template of profile {name}: booting")
    made: list[Template] = []
    # Pods with volumes get their files another way than those without, where both ways are there.
    for files in ("auto", "virtiofs") if wanted.files == "auto" else (wanted.files,):
        _make(settings, wanted.replace(files=files), tenant)
        made = [template for template in _store().list() if template.key not in before]
        if any(template.about.get("files") == "virtiofs" for template in made):
            break
    if as_json:
        print_json({"made": [_summary(template) for template in made]})
    for template in made:
        if not as_json:
            print_line(f"template {template.key}, {template.about['ram_bytes'] >> 20} MiB of RAM saved")
    if not made and not as_json:
        print_line("the template is there already, or another process is making it")


def _make(settings: Settings, profile: Profile, tenant: str) -> None:
    from shim import apprentice

    status, paths = apprentice.make(settings, profile, tenant)
    if status:
        log = paths.ended / "shim.log"
        words = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        raise FailedPrecondition("the template could not be made", details="\n".join(words[-8:]) or None)


@app.command("list")
def list_templates(as_json: Json = False) -> None:
    """List the templates, the one used last first."""
    listed = _store().list()
    if as_json:
        print_json([_summary(template) for template in listed])
        return
    header = ("KEY", "PROFILE", "TENANT", "VCPUS", "MEMORY", "SAVED", "ACCEL", "IMAGE", "USED")
    print_table(header, [_row(template) for template in listed])


@app.command()
def show(key: Key, as_json: Json = False) -> None:
    """Show what a template was made of."""
    template = _find(key)
    if as_json:
        print_json(_summary(template) | template.about)
        return
    print_line(f"key           {template.key}")
    print_line(f"directory     {template.directory}")
    for name, value in template.about.items():
        print_line(f"{name:13} {value}")


@app.command()
def rm(
    keys: Annotated[list[str], typer.Argument(help="Keys, or the digits they begin with.")],
    as_json: Json = False,
) -> None:
    """Remove templates. Pods that were restored from them go on; the next ones of their shape are booted."""
    # Also one that cannot be read.
    removed = [_one_of(_store().keys(), key) for key in keys]
    for key in removed:
        _store().remove(key)
    if as_json:
        print_json({"removed": removed})
    else:
        for key in removed:
            print_line(f"removed {key}")


def _find(key: str) -> Template:
    return load_template(_store().root / _one_of(_store().keys(), key))


def _one_of(keys: tuple[str, ...], wanted: str) -> str:
    found = [key for key in keys if wanted and key.startswith(wanted)]
    if not found:
        raise NotFound(f"no template {wanted}", hint="casemate template list")
    if len(found) > 1:
        raise InvalidArgument(f"{wanted} is ambiguous", ", ".join(sorted(found)))
    return found[0]


def _summary(template: Template) -> dict[str, Any]:
    wanted = (
        "image",
        "profile",
        "tenant",
        "accel",
        "kernel",
        "vcpus",
        "memory_bytes",
        "ram_bytes",
        "created_at",
    )
    summary = {name: template.about.get(name) for name in wanted}
    return {
        "key": template.key,
        "directory": str(template.directory),
        "used_at": last_used(template),
    } | summary


def _row(template: Template) -> tuple[str, ...]:
    about = template.about
    used = datetime.datetime.fromtimestamp(last_used(template)).astimezone()
    return (
        template.key[:12],
        str(about.get("profile", "")),
        str(about.get("tenant") or "all"),
        str(about.get("vcpus", "")),
        f"{int(about.get('memory_bytes', 0)) >> 20} MiB",
        f"{int(about.get('ram_bytes', 0)) >> 20} MiB",
        str(about.get("accel", "")),
        str(about.get("image", ""))[7:19],
        f"{used:%Y-%m-%d %H:%M}",
    )
