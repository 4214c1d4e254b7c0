"""How fast a long job goes, for the lines that tell of it."""

import time


class Pace:
    """Counts from its making on.

    Args:
      count: how much there is to do.
      seconds: between two lines, at the least.
    """

    def __init__(self, count: float, seconds: float = 10.0):
        self._count, self._seconds = count, seconds
        self._began = self._said = time.monotonic()

    def due(self, done: float) -> bool:
        """Whether it is time for a line, as it is when all is done."""
        now = time.monotonic()
        if done != self._count and now - self._said <= self._seconds:
            return False
        self._said = now
        return True

    def rate(self, done: float) -> float:
        """What is done in a second."""
        return done / max(time.monotonic() - self._began, 1e-9)

    def left(self, done: float) -> float:
        """Seconds until all is done, at that rate."""
        return (self._count - done) / self.rate(done)
