"""Running the scripts on machines that are rented: what the launchers in launch/ share."""

from safetydpo_jax.pods.command import RESTART, add_slice, command_of, parser
from safetydpo_jax.pods.shell import Shell
from safetydpo_jax.pods.slices import Slice, parse_slice

__all__ = ["RESTART", "Shell", "Slice", "add_slice", "command_of", "parse_slice", "parser"]
