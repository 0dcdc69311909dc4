"""The machine's root ports for devices that come while it runs, whoever has them plugged in."""

from rpc.errors import ResourceExhausted
from shim.vm import designer


class Ports:
    """Of one machine. A port is the number of its bus."""

    def __init__(self) -> None:
        self._free = list(designer.PORT_BUSES)

    def take(self, what: str) -> int:
        """Raises ResourceExhausted, naming what there is no port for."""
        if not self._free:
            raise ResourceExhausted(
                f"{what}: a machine has room for {len(designer.PORT_BUSES)} network interfaces and disks"
            )
        return self._free.pop(0)

    def give_back(self, bus: int) -> None:
        self._free.append(bus)
        self._free.sort()
