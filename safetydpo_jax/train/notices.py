"""Notices of Google Cloud that this machine is about to be taken away: time to save and to stop.

https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice
"""

import contextlib
import http.client
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator

import jax

from safetydpo_jax.train.workdir import Stop

HOST = "GCE_METADATA_HOST"  # the variable that names another server, as for Google's libraries
POLL_SECONDS = 5.0
TRIES = 3  # in a row that may fail before that is told
# What is asked, and the answer that is a notice.
NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}


@contextlib.contextmanager
def heeded(stop: Stop, progress: Callable[[str], None]) -> Iterator[None]:
    """Within, a notice asks the run to stop, as SIGTERM does.

    One that is there at the start is none: the run was started again after it, and may go on until
    the machine is gone. Only hosts of TPUs are asked for notices, and others where the variable
    GCE_METADATA_HOST is set.

    Args:
      stop: where to ask.
      progress: takes lines of text.
    """
    host = os.environ.get(HOST) or (
        "metadata.google.internal" if jax.default_backend() == "tpu" else ""
    )
    done = threading.Event()
    if host:
        threading.Thread(target=_watch, args=(host, stop, done, progress), daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _watch(host: str, stop: Stop, done: threading.Event, progress: Callable[[str], None]) -> None:
    failed, known = 0, None
    while True:
        try:
            found = {name for name, notice in NOTICES.items() if _answer(host, name) == notice}
            failed = 0
        except (OSError, http.client.HTTPException) as error:
            failed += 1
            if failed == TRIES:
                progress(
                    f"no notices of preemption or maintenance: {host} does not answer ({error})"
                )
        else:
            if known is None:
                known = found
            if new := found - known:
                progress(f"this machine is about to be taken away ({', '.join(sorted(new))})")
                stop.asked = signal.SIGTERM
                return
        if done.wait(POLL_SECONDS):
            return


def _answer(host: str, name: str) -> str:
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{name}", headers={"Metadata-Flavor": "Google"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=2) as answer:
        return answer.read().decode().strip()
