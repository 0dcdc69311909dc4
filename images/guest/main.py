"""The first Python that runs in a guest: makes imports fast, then becomes the agent.

Finding, opening and reading a module's file takes an emulated guest longer than running it, so the
builder puts everything that the agent imports into one file (images/bundle.py). Modules that are
not in it are found as usual. Must not know what the agent does.
"""

import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import ExtensionFileLoader
from marshal import load, loads

TYPE_CHECKING = False  # typing itself is not worth its 30 ms here
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

CODE = "/usr/lib/casemate"
BUNDLE = f"{CODE}/bundle"


class Finder:
    """Finds and executes the bundle's modules: what importlib calls a meta path finder and a loader."""

    def __init__(self, bundle: dict[str, tuple[str, bool, bytes | None]]) -> None:
        """bundle: name -> (path in the guest, is a package, marshalled code or None for an extension)."""
        self._bundle = bundle

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in self._bundle:
            return None
        file, is_package, code = self._bundle[name]
        loader: Any = ExtensionFileLoader(name, file) if code is None else self
        spec = ModuleSpec(name, loader, origin=file, is_package=is_package)
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(file.rpartition("/")[0])
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        """Leaves it to importlib."""

    def exec_module(self, module: "ModuleType") -> None:
        code = self._bundle.pop(module.__name__)[2]  # it is not needed twice
        exec(loads(code or b""), module.__dict__)  # noqa: S102, S302 - what any importer does; our own image


def main() -> None:
    sys.path.insert(0, CODE)
    with open(BUNDLE, "rb") as file:
        sys.meta_path.insert(0, Finder(load(file)))  # noqa: S302
    from agent.__main__ import main as agent

    agent()


if __name__ == "__main__":
    main()
