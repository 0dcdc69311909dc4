"""One file with the code of every module that the agent imports, for images/guest/main.py.

What those are is found out by importing the agent in the guest's own Python at build. Must not
know how the guest loads the bundle.
"""

from pathlib import Path

from images.bytecode import GuestPython

# argv: root file system, directory of the code in the guest, module, the bundle to write.
# A module without a spec is a stand-in of the agent's for one that it does not want to load.
_COLLECT = """
import sys
there = set(sys.modules)
root, directory, module, target = sys.argv[1:]
sys.path.insert(0, root + directory)
__import__(module)
bundle = {}
for name in sorted(set(sys.modules) - there):
    spec = sys.modules[name].__spec__
    if spec is None or not spec.has_location:
        continue
    path = spec.origin
    if not path.startswith(root):
        sys.exit(f"{name} was imported from {path}, outside of the image")
    if path.endswith(".pyc"):
        with open(path, "rb") as file:
            code = file.read()[16:]
    elif path.endswith(".so"):
        code = None
    else:
        sys.exit(f"{name} was imported from {path}, which is not compiled")
    bundle[name] = (path.removeprefix(root), spec.submodule_search_locations is not None, code)
import marshal
with open(target, "wb") as file:
    file.write(marshal.dumps(bundle))
print(*bundle)
"""


def write_bundle(python: GuestPython, root: Path, code: str, module: str) -> list[str]:
    """Writes root/CODE/bundle; python must be the one in root. Returns the names of the modules in it."""
    target = root / code.lstrip("/") / "bundle"
    return python.execute(_COLLECT, root, code, module, target).decode().split()
