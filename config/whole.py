"""Files that are there wholly, or as they were: written beside their place, and then put there.

It must not know what is in them.
"""

import os
from contextlib import ExitStack


def write_whole(
    path: "str | os.PathLike[str]", content: bytes, mode: int = 0o600, *, lasting: bool = False
) -> None:
    """A reader sees the old or the new, also beside other writers of the same file. Raises OSError.

    lasting: also after a power cut.

    The partial name is random: every shim is pid 1 to itself.
    """
    directory, name = os.path.split(path)
    partial = os.path.join(directory, f".{name}.{os.urandom(8).hex()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with ExitStack() as undo:
        undo.callback(os.unlink, partial)
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            if lasting:
                file.flush()
                os.fsync(descriptor)
        os.replace(partial, path)
        undo.pop_all()
