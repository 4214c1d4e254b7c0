"""How much memory this process takes at its peak; Linux."""

import threading
from pathlib import Path


class Memory:
    """Peaks of this process's memory within the context, in MB.

    `anonymous` is what the process holds itself, `resident` has the pages of mapped files as well:
    PyTorch leaves the weights in those.
    """

    def __enter__(self) -> "Memory":
        self.before = self.anonymous = self.resident = 0
        self._note()
        self.before = self.anonymous
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self._note()

    def _note(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        now = {
            x.split()[0]: int(x.split()[1]) * 1024 // 10**6
            for x in lines
            if x.startswith(("Rss", "VmR"))
        }
        self.anonymous = max(self.anonymous, now["RssAnon:"])
        self.resident = max(self.resident, now["VmRSS:"])

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._note()
