"""Whether a pod has containers, for who waits until it has had none for long.

It must not know what a container is: it is told how many there are.
"""

import asyncio


class Occupancy:
    def __init__(self) -> None:
        self._some, self._none = asyncio.Event(), asyncio.Event()
        self.kept = False

    def keep(self) -> None:
        """From now on who has made the pod ends it, as it knows of it apart from its containers."""
        self.kept = True
        self.now(1)

    def now(self, count: int) -> None:
        """count: of containers, with those that are being made."""
        is_so, is_not = (self._some, self._none) if count or self.kept else (self._none, self._some)
        is_so.set()
        is_not.clear()

    async def abandoned(self, after_s: float) -> None:
        """Returns when there has been none for so long."""
        while True:
            try:
                async with asyncio.timeout(after_s):
                    await self._some.wait()
            except TimeoutError:
                return
            await self._none.wait()
