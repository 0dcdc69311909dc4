"""A template's RAM on its way into that of the machine that is restored from it."""

import threading

from shim import phases
from shim.trace import Trace
from shim.vm import ram
from shim.vm.blame import TemplateUnusable


class Filling(threading.Thread):
    """Copies a template's RAM. A thread of its own: another one waits for it, and so may the event loop."""

    def __init__(self, source: int, target: int, trace: Trace) -> None:
        super().__init__(name="ram-copy", daemon=True)
        self._source, self._target, self._trace = source, target, trace
        self._error: OSError | None = None

    def run(self) -> None:
        try:
            with self._trace.span(phases.RAM_COPY, phases.POD_READY):
                ram.fill(self._source, self._target)
        except OSError as error:
            self._error = error

    def wait(self) -> None:
        """Until the copy is whole. Raises TemplateUnusable if it cannot be."""
        self.join()
        if self._error is not None:
            raise TemplateUnusable("the template's RAM cannot be copied", str(self._error)) from self._error
