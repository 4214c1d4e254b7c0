"""A command as a job of several processes over loopback, for tests and benchmarks."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path


class Job:
    """Its processes, which have `devices` in all, as many each."""

    def __init__(self, count, arguments, devices=4, own=lambda i: [], env=lambda i: {}):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flag = f"--xla_force_host_platform_device_count={devices // count}"
        self._folder = Path(tempfile.mkdtemp())
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(self._output(i).open("w")) for i in range(count)]
            self.processes = [
                subprocess.Popen(
                    [*arguments, "--distributed", *own(i)],
                    env=os.environ
                    | {"XLA_FLAGS": flag, "JAX_COORDINATOR_ADDRESS": address}
                    | {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
                    | env(i),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                for i, output in enumerate(outputs)
            ]

    def _output(self, i):
        return self._folder / f"process_{i}.log"

    def said(self, i):
        """What a process has said until now."""
        return self._output(i).read_text()

    def wait_until(self, condition):
        """Waits for what comes before the end of any process."""
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.end()
            time.sleep(0.01)

    def end(self, timeout=900):
        """The exit codes, and what each said; once. Those that do not end in time are killed."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
        for process in self.processes:
            process.kill()
        codes = [process.wait() for process in self.processes]
        said = [self.said(i) for i in range(len(codes))]
        shutil.rmtree(self._folder)
        return codes, said
