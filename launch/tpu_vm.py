r"""Runs a job on every host of a Cloud TPU slice, which it asks for, installs on and deletes.

    python launch/tpu_vm.py --name hate --zone us-west4-a --topology v5e:4x4 --spot \
        -- train --config hate:sd15 --config.pairs.path=gs://BUCKET/pairs/hate \
        --config.batch_size=16 --config.accumulation=1 --workdir gs://BUCKET/runs/hate

After -- comes a command of `safetydpo`. --dry-run prints every command of gcloud's and runs none.
The slice is a queued resource: it may be minutes or days until there is one. The job goes on when
the connection breaks; when the slice is taken away (--spot), or a process of the job is lost, it is
started again, on a new slice, and goes on from its last checkpoint if --workdir is in a bucket. In
the end the slice is deleted; --keep leaves it, and it costs, until the same command is run without.
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the package

from safetydpo_jax.command_line import ROOT
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.pods import RESTART, Shell, Slice, add_slice, command_of, parse_slice, parser

# On each host, in ~/safetydpo: the wheel, venv/, log, pid and, when the job has ended, exit.
# Its image may have an older Python: uv brings one.
INSTALL = """set -e; cd safetydpo; export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
uv venv --quiet --allow-existing --python 3.11 venv
uv pip install --quiet --python venv/bin/python "safetydpo-jax[tpu,gcs] @ file://$PWD/{wheel}\""""
START = "cd safetydpo; rm -f exit; setsid nohup bash -c {job} >log 2>&1 </dev/null & echo $! >pid"
JOB = "venv/bin/safetydpo {command}; echo $? >exit"
# Its exit code is its own: another is that of a connection that failed.
RUNS, RUNS_NOT = '(cd safetydpo && kill -0 "$(cat pid)") 2>/dev/null || exit 100', 100
# What is killed leaves no exit. An exit code of 1 is gcloud's alone: the job's is told as 101.
FOLLOW = """cd safetydpo; tail -n +1 -s 0.2 -F --pid="$(cat pid)" log
code="$(cat exit 2>/dev/null || echo 137)"; [ "$code" = 1 ] && code=101; exit "$code\""""
LAST_WORDS = 'cd safetydpo; echo "== $(hostname)"; tail -n 3 log'
STOP = 'mkdir -p safetydpo; cd safetydpo; kill -KILL -- "-$(cat pid)" 2>/dev/null; rm -f pid'
BROKEN = (1, 255)  # exit codes of gcloud and of ssh, when there is no connection
TRIES = 15  # before a slice that says it is there, and cannot be reached, is given up
HELD_SECONDS = 60  # a connection that lasted so long was one: what fails later is counted anew
FAILURES = 3  # requests that Google Cloud refuses one after the other, as without a quota
GONE = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")  # states of a queued resource
POLL_SECONDS, WAITS = 20, 6


def main() -> None:
    """Reads the command line and runs the job until it has ended."""
    args = parse_arguments()
    job = shlex.join(command_of(args.command))
    slice_ = parse_slice(args.topology)
    shell = Shell(args.dry_run)
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(shell, Path(folder))
        vm = Vm(shell, args, slice_)
        try:
            code = vm.run(wheel, job, args.restarts)
        except KeyboardInterrupt:
            print(f"\nThe slice goes on, and costs; to delete it: {shlex.join(vm.deletion)}")
            raise
        if not args.keep:
            vm.delete()
    if code:
        raise UserError(f"the job ended with exit code {code}; what it says is above")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    reader = parser(__doc__ or "")
    add_slice(reader)
    reader.add_argument("--zone", required=True, help="as us-west4-a")
    reader.add_argument("--project", help="Google Cloud's; gcloud's own by default")
    reader.add_argument(
        "--keep", action="store_true", help="leave the slice when the job has ended"
    )
    return reader.parse_args()


def build(shell: Shell, folder: Path) -> Path:
    """The wheel of this checkout, with its configs as they are now."""
    if not (ROOT / "pyproject.toml").is_file():
        raise UserError("run launch/tpu_vm.py of a checkout: the slice's hosts get its wheel")
    shell.run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir",
              str(folder), str(ROOT))  # fmt: skip
    return next(folder.glob("*.whl"), folder / "safetydpo_jax-0-py3-none-any.whl")


class Vm:
    """The virtual machines of one slice."""

    def __init__(self, shell: Shell, args: argparse.Namespace, slice_: Slice):
        self._shell, self._args, self._slice = shell, args, slice_
        where = ["--zone", args.zone, *(["--project", args.project] if args.project else [])]
        self._queued = ["gcloud", "compute", "tpus", "queued-resources"]
        self._tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
        self._where = where
        self.deletion = [*self._queued, "delete", args.name, *where, "--force", "--quiet"]

    def run(self, wheel: Path, job: str, restarts: int) -> int:
        """The job's exit code, however many slices that took."""
        for left in range(restarts, -1, -1):
            self._wait_for_slice()
            code = self._run_once(wheel, job)
            if code and self._state() == "ACTIVE":
                self._ssh(LAST_WORDS)
            if code not in RESTART or not left:
                return code
            print(f"exit code {code}: it is started again, {left} times more at the most")
        raise AssertionError  # the loop returns

    def delete(self) -> None:
        """Gives the slice back."""
        self._shell.run(*self.deletion)

    def _run_once(self, wheel: Path, job: str) -> int:
        """The job's exit code; that of a lost process if the slice is taken away."""
        home = f"{self._args.name}:safetydpo/"
        scp = [*self._tpu, "scp", str(wheel), home, "--worker=all", *self._where, "--quiet"]
        steps = (
            lambda: self._ssh(STOP),  # what is left of a job that has lost a process
            lambda: self._shell.code(*scp),
            lambda: self._ssh(INSTALL.format(wheel=wheel.name)),
            lambda: self._ssh(START.format(job=shlex.quote(JOB.format(command=job)))),
        )
        runs = RUNS_NOT if self._shell.dry_run else self._reached(RUNS)
        if runs is None:
            return RESTART[0]
        if runs:
            for step in steps:
                if (code := step()) and self._is_taken_away():
                    return RESTART[0]
                if code:
                    raise UserError(f"gcloud failed ({code}), as it says above; {self._kept()}")
        code = self._reached(FOLLOW)
        return RESTART[0] if code is None else code

    def _reached(self, command: str) -> int | None:
        """What a command on the first host ends with, however often the connection breaks.

        None if the slice is taken away.

        Raises:
          UserError: there is no connection any more.
        """
        tries = 0
        while tries < TRIES:
            began = time.monotonic()
            if (code := self._ssh(command, worker="0")) not in BROKEN:
                return code
            tries = 1 if time.monotonic() - began > HELD_SECONDS else tries + 1
            if self._is_taken_away():
                return None
            print("the connection is lost; what runs there goes on", flush=True)
        raise UserError(f"{self._args.name} cannot be reached; {self._kept()}")

    def _is_taken_away(self) -> bool:
        """Whether it is, or is so within a while: a slice says so later than it cannot be reached.

        Raises:
          UserError: there is no such slice any more, which is nobody's doing but a user's.
        """
        for _ in range(WAITS):
            if (state := self._state()) in GONE:
                return True
            if state == "":
                raise UserError(f"there is no slice {self._args.name} any more")
            time.sleep(POLL_SECONDS)
        return False

    def _kept(self) -> str:
        return (
            f"the slice is kept, and costs: start this command again, or "
            f"{shlex.join(self.deletion)}"
        )

    def _ssh(self, command: str, worker: str = "all") -> int:
        return self._shell.code(
            *self._tpu, "ssh", self._args.name, f"--worker={worker}", *self._where, "--quiet",
            "--command", command,
        )  # fmt: skip

    def _state(self) -> str | None:
        """Of the queued resource; "" if there is none, None without an answer."""
        if self._shell.dry_run:
            return "ACTIVE"
        return self._shell.ask(
            *self._queued, "list", f"--filter=name~(^|/){self._args.name}$", *self._where,
            "--format=value(state.state)",
        )  # fmt: skip

    def _wait_for_slice(self) -> None:
        """Asks for the slice, if that is not done, and waits until it is there."""
        began, failures = time.monotonic(), 0
        said: str | None = ""
        if self._shell.dry_run:
            self._create()
        while (state := self._state()) != "ACTIVE":
            if state and state in GONE and not state.endswith("ING"):  # else it would refuse
                failures += state == "FAILED"
                if failures == FAILURES:
                    show = [*self._queued, "describe", self._args.name, *self._where]
                    raise UserError(
                        f"the request failed {failures} times, as without a quota for such a slice;"
                        f" {shlex.join(show)} shows why"
                    )
                self.delete()
                state = ""
            if state == "":
                self._create()
            elif state != said:
                no_answer = f"no answer ({self._shell.failure}); it is asked again"
                print(f"{self._args.name}: {state or no_answer}", flush=True)
                said = state
            time.sleep(POLL_SECONDS)
        print(f"{self._args.name} is there, after {time.monotonic() - began:.0f} s", flush=True)

    def _create(self) -> None:
        slice_, name = self._slice, self._args.name
        self._shell.run(
            *self._queued, "create", name, "--node-id", name, *self._where,
            "--accelerator-type", slice_.accelerator_type, "--runtime-version", slice_.runtime,
            *(["--spot"] if self._args.spot else []),
        )  # fmt: skip


if __name__ == "__main__":
    run_main(main)
