"""The bundle that containerd hands over: reading its config.json, and nothing about what it means.

Imported by `start` before anything heavy: standard library inside functions only.
"""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def read_config(bundle: str) -> "dict[str, Any] | None":
    """config.json as it stands, or None if there is none (with `sandboxer = "shim"` there need not be).

    Raises InvalidArgument for one that is not an object of JSON.
    """
    import json

    try:
        with open(os.path.join(bundle, "config.json"), "rb") as file:
            document = json.load(file)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        from rpc.errors import InvalidArgument

        raise InvalidArgument(f"{bundle}/config.json is not JSON", details=str(error)) from error
    if not isinstance(document, dict):
        from rpc.errors import InvalidArgument

        raise InvalidArgument(f"{bundle}/config.json is not a JSON object")
    return document


def is_containers(document: "dict[str, Any] | None") -> bool:
    """Whether such a config.json is a container's, whose shim makes its machine at once.

    A sandbox of containerd's Sandbox API has none, or one without a process: there is none to run, and what
    it wants is said later (sandboxlife.py).
    """
    return document is not None and "process" in document
