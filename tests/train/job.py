"""A command as a job of several processes over loopback, for tests and benchmarks."""

import os
import socket
import subprocess


class Job:
    """Its processes, which have `devices` in all, as many each."""

    def __init__(self, count, arguments, devices=4, own=lambda i: [], env=lambda i: {}):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        flag = f"--xla_force_host_platform_device_count={devices // count}"
        self.processes = [
            subprocess.Popen(
                [*arguments, "--distributed", *own(i)],
                env=os.environ
                | {"XLA_FLAGS": flag, "JAX_COORDINATOR_ADDRESS": address}
                | {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
                | env(i),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(count)
        ]

    def end(self, timeout=900):
        """The exit codes, and what each said."""
        try:
            said = [process.communicate(timeout=timeout)[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()  # if they did not end in time
        return [process.returncode for process in self.processes], said
