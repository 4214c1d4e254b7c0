"""A command as a job of several processes over loopback, for tests and benchmarks."""

import os
import socket
import subprocess
import tempfile


class Job:
    """Its processes, which have `devices` in all, as many each."""

    def __init__(self, count, arguments, devices=4, own=lambda i: [], env=lambda i: {}):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flag = f"--xla_force_host_platform_device_count={devices // count}"
        self._outputs = [tempfile.TemporaryFile() for _ in range(count)]  # noqa: SIM115
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
            for i, output in enumerate(self._outputs)
        ]

    def said(self, i):
        """What a process has said until now."""
        # Not by its own position, from which the process writes.
        size = os.fstat(self._outputs[i].fileno()).st_size
        return os.pread(self._outputs[i].fileno(), size, 0).decode()

    def end(self, timeout=900):
        """The exit codes, and what each said."""
        try:
            codes = [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()  # if they did not end in time
        return codes, [self.said(i) for i in range(len(codes))]
