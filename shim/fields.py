"""Fields of an OCI document by name: refused, or left out, each with its reason.

A table names them as "field" or "table.field"; `where` is what stands before that, as "linux.". What is
empty, zero or null is no request: Docker writes every field there is. It must not know which fields there
are: spec.py and resources.py do.
"""

from typing import Any

from rpc.errors import Unimplemented
from shim.oci import Document, typed

Table = tuple[tuple[str, str], ...]
"""(name, why)."""


def refuse(document: Document, table: Table, where: str) -> None:
    """Raises Unimplemented for the first of them that the document asks for."""
    for name, why in table:
        if _value(document, name, where):
            raise Unimplemented(f"{where}{name}: not possible in a VM", hint=why)


def leave_out(document: Document, table: Table, where: str) -> tuple[Document, tuple[str, ...]]:
    """A copy without them, and a line for each that it asked for."""
    result = dict(document)
    lines = []
    for name, why in table:
        if _value(result, name, where):
            lines.append(f"{where}{name} is left out: {why}")
        outer, _, inner = name.partition(".")
        if inner and isinstance(result.get(outer), dict):
            result[outer] = {key: value for key, value in result[outer].items() if key != inner}
        elif not inner:
            result.pop(outer, None)
    return result, tuple(lines)


def _value(document: Document, name: str, where: str) -> Any:
    outer, _, inner = name.partition(".")
    value = document.get(outer)
    if not inner or value is None:
        return value
    return typed(value, dict, f"{where}{outer}").get(inner)
