"""Other programs' commands, printed before they run."""

import shlex
import subprocess
from collections.abc import Callable

from safetydpo_jax.errors import UserError


class Shell:
    """Runs commands, or only says what it would run.

    Args:
      dry_run: run nothing.
      say: takes lines of text.

    Attributes:
      failure: why `ask` had no answer, the last time.
    """

    def __init__(self, dry_run: bool, say: Callable[[str], None] = print):
        self.dry_run, self._say, self.failure = dry_run, say, ""

    def run(self, *words: str, given: str = "") -> None:
        """Runs a command, its output on the screen.

        Args:
          words: the command.
          given: its standard input.

        Raises:
          UserError: it fails, or is not installed.
        """
        if code := self.code(*words, given=given):
            raise UserError(f"{words[0]} failed ({code}); what it says is above")

    def code(self, *words: str, given: str = "") -> int:
        """The exit code of such a command.

        Raises:
          UserError: it is not installed.
        """
        self._say(f"$ {shlex.join(words)}" + (f" <<EOF\n{given}EOF" if given else ""))
        if self.dry_run:
            return 0
        options = {"input": given, "text": True} if given else {"stdin": subprocess.DEVNULL}
        return self._done(words, **options).returncode

    def ask(self, *words: str) -> str | None:
        """What a command says, which changes nothing; None if it fails, `failure` says why.

        Raises:
          UserError: it is not installed.
        """
        done = self._done(words, capture_output=True, text=True)
        said = done.stderr.strip().splitlines() or ["it does not say why"]
        self.failure = next((line for line in said if line.startswith("ERROR")), said[-1])
        return None if done.returncode else done.stdout.strip()

    def _done(self, words: tuple[str, ...], **options: object) -> subprocess.CompletedProcess:
        try:
            return subprocess.run(words, check=False, **options)  # pyright: ignore
        except FileNotFoundError:
            raise UserError(f"{words[0]} is not installed here: see docs/pods.md") from None
