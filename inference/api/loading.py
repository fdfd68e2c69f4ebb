"""Models that requests ask for, loaded beside everything else."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from ..batcher import Batcher, QueueFull
from ..pool import ModelPool, UnknownModel


class Loader:
    """Loads one model at a time, on a thread of its own: requests for loaded ones do not wait.

    Args:
        pool: the models.

    Attributes:
        waiting: how many requests wait for loads.
    """

    def __init__(self, pool: ModelPool):
        self.pool = pool
        self._executor = ThreadPoolExecutor(1, "loader")
        self._loads: dict[str, asyncio.Future[Batcher]] = {}
        self.waiting = 0

    async def get(self, name: str) -> Batcher:
        """The batcher of a model; requests for one that is being loaded wait for the same load.

        Of one in memory whose files have changed, the request that finds it so waits for the new
        one, those that come meanwhile get the old one.

        Raises:
            UnknownModel: if there is none of that name.
            QueueFull: if as many requests wait already as could be written and wait.
            UserError: if it cannot be loaded.
        """
        batcher = self.pool.find_loaded(name)
        full = self.waiting >= self.pool.rows + self.pool.queue
        if batcher is not None:
            outdated = await asyncio.to_thread(self.pool.is_outdated, name)
            if not outdated or full or name in self._loads:
                return batcher
        elif name not in await asyncio.to_thread(self.pool.offers):
            raise UnknownModel(name)
        elif full:
            raise QueueFull(10.0)
        if name not in self._loads:
            loop = asyncio.get_running_loop()
            self._loads[name] = loop.run_in_executor(self._executor, self.pool.get, name)
            self._loads[name].add_done_callback(lambda load: self._end(name, load))
        self.waiting += 1
        try:
            return await asyncio.shield(self._loads[name])  # one that leaves ends it for nobody
        finally:
            self.waiting -= 1

    def _end(self, name: str, load: asyncio.Future[Batcher]) -> None:
        del self._loads[name]
        if not load.cancelled():
            load.exception()  # which nobody may wait for any more

    def close(self) -> None:
        """Begin no further load."""
        self._executor.shutdown(wait=False, cancel_futures=True)
