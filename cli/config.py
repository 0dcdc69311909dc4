"""`casemate config show|check`: the settings in force, and where each one came from."""

import os
from typing import Annotated, Any

import typer

from cli.exits import ExitCode
from cli.output import JsonOption, print_error, print_json, print_line, print_table
from rpc.errors import InvalidArgument

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Show or check the settings in force.",
)


@app.command()
def show(as_json: Annotated[bool, JsonOption] = False) -> None:
    """Print every option's value and the file and line that set it."""
    from config.places import IMAGE_DIR_VARIABLE
    from config.sources import read_settings

    loaded = read_settings()
    values = dict(_flat(loaded.merged))
    came_from = {key: loaded.place(key) for key in values}
    if image_dir := os.environ.get(IMAGE_DIR_VARIABLE):
        values["image_dir",] = image_dir
        came_from["image_dir",] = f"environment, {IMAGE_DIR_VARIABLE}"
    rows = []
    for key, value in values.items():
        origin = loaded.origins[key]
        inherited = f" ({'.'.join(origin.key)})" if origin.key != key else ""
        rows.append((".".join(key), _toml(value), came_from[key] + inherited))
    if as_json:
        print_json(
            [{"key": ".".join(key), "value": value, "from": came_from[key]} for key, value in values.items()]
        )
        return
    print_table(("KEY", "VALUE", "FROM"), rows)


@app.command()
def check(as_json: Annotated[bool, JsonOption] = False) -> None:
    """Say whether the config files are valid, and what is wrong if not (exit code 1)."""
    from config.sources import read_settings

    try:
        loaded = read_settings()
    except InvalidArgument as error:
        if as_json:
            print_json({"valid": False, "error": error.brief, "details": error.details, "hint": error.hint})
        else:
            print_error(error.brief, error.details, error.hint)
        raise typer.Exit(ExitCode.FAILURE) from None
    files = [source.path for source in loaded.sources]
    if as_json:
        print_json({"valid": True, "files": files})
        return
    print_line(("valid", "green"), f", read from {', '.join(files)}")


def _flat(table: dict[str, Any], at: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Dotted keys and their values, tables after what stands beside them."""
    plain = [((*at, key), value) for key, value in table.items() if not isinstance(value, dict)]
    for key, value in table.items():
        if isinstance(value, dict):
            plain += _flat(value, (*at, key))
    return plain


def _toml(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)
