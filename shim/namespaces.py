"""The namespaces that a shim was started in, kept, so that programs of the host's can still be run there.

A thread has namespaces of its own (setns(2)): one that enters the host's, starts the program and ends leaves
the rest of the shim where it is. It must not know which programs.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, TypeVar

from shim import system

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HostNamespaces:
    """Descriptors of containerd's network and mount namespaces, closed in every program that is executed."""

    net: int
    mnt: int

    @classmethod
    def current(cls) -> Self:
        """Those of the calling process, before it leaves them."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        return cls(os.open("/proc/self/ns/net", flags), os.open("/proc/self/ns/mnt", flags))

    def run(self, function: Callable[[], T]) -> T:
        """function() as if nothing had been left, but for the PID namespace, which no thread can change.

        The caller waits. Raises what function raises, and OSError where the namespaces cannot be entered.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                system.unshare(system.CLONE_FS)  # threads share it, and a mount namespace is entered alone
                system.setns(self.mnt, system.CLONE_NEWNS)
                system.setns(self.net, system.CLONE_NEWNET)
                results.append(function())
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)

        thread = threading.Thread(target=work, name="in-host")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]
