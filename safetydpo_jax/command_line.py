"""The scripts' command lines: a config with overrides and a workdir, or a checkpoint."""

import argparse
import itertools
import re
import shlex
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from safetydpo_jax.errors import MissingFileError, UserError

# Where configs/ and launch/ are: a wheel holds them in share/, a checkout in its root.
_SHARE = Path(__file__).resolve().with_name("share")
ROOT = _SHARE if _SHARE.is_dir() else _SHARE.parents[1]
_HERE = "this script writes to this host's disk; give a path there, and copy what it makes"
_PROMPTS = "config.health.prompts"  # a key whose value is not shown


def shipped(path: str) -> Path:
    """A file or folder as the user gives it, or else beside the configs."""
    return next((p for p in (Path(path), ROOT / path) if p.exists()), Path(path))


def local_path(text: str) -> Path:
    """For argparse: a path on this host; an address would become a folder named `gs:`."""
    if "://" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is an address: {_HERE}")
    return Path(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --model_config and --dtype: a checkpoint, for scripts without a config."""
    parser.add_argument(
        "--model",
        required=True,
        help="a diffusers directory or a .safetensors file (original layout), here or at gs://, "
        "a hub id, or emoji",
    )
    parser.add_argument(
        "--model_config",
        default="",
        help="what such a file is, if it does not say: sd15, sd21-base, sd21-768, sdxl, or a "
        "folder with its configs",
    )
    add_dtype_argument(parser)


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype."""
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="of the model, in memory and in what it computes (float32); bfloat16 is half as large",
    )


def add_drawing_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --sampler and --guidance_scale."""
    # The names of `diffusion.SAMPLERS`, which --help need not wait for.
    parser.add_argument("--sampler", default="ddim", choices=("ddim", "dpmsolver++", "euler"))
    parser.add_argument("--guidance_scale", type=float, default=7.5, help="1 is none (7.5)")


def read_command_line(
    argv: list[str], description: str, *, bucket: bool = False
) -> tuple[ConfigDict, Path | str]:
    """The config with its overrides, and the workdir, by default runs/ and the config file's name.

    Args:
      argv: the command line, the program's name first.
      description: what --help prints.
      bucket: the workdir may be an address, like gs://bucket/folder, which stays text.

    Raises:
      UserError: no config, an unknown key or flag, a value of the wrong type, an address where
        there may be none.
      Exception: what the config file's own code raised, if that is no UserError.
    """
    arguments, file = _config_first(argv[1:])
    argv = [argv[0], *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "the run's folder", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    try:
        rest = values(argv)
    except (AttributeError, LookupError) as error:
        if not _is_of_an_override(error, file):
            raise
        raise _unknown_key(error) from None
    except (flags.Error, ValueError) as error:
        raise _explained(error) from None
    if values.help:
        print(description)
        raise SystemExit(0)
    if len(rest) > 1:
        # It may be a piece of a prompt without its quotes.
        stray = "a word" if any(_PROMPTS in word for word in arguments) else repr(rest[1])
        raise UserError(
            f"{stray} is no flag: write --config NAME, --config.KEY=VALUE or --workdir DIR"
        )
    if values.config is None:
        raise UserError("no config: give one, as in --config hate")
    _check_overrides(values.config, arguments)
    if values.workdir is not None and (not values.workdir or values.workdir.startswith("-")):
        raise UserError("--workdir is empty: is a variable of the shell not set?")
    workdir = values.workdir or f"runs/{file.stem}"
    if "://" not in workdir:
        return values.config, Path(workdir)
    if not bucket:
        raise UserError(f"--workdir {workdir}: {_HERE}")
    return values.config, workdir


def pop_option(argv: list[str], name: str) -> tuple[str, list[str]]:
    """An option of one script's own: its value, "" if it is not given, and the other arguments.

    Raises:
      UserError: it has no value.
    """
    for i, argument in enumerate(argv):
        key, equals, value = argument.partition("=")
        if key == name:
            if not equals:
                value = "".join(argv[i + 1 : i + 2])
            if not value or value.startswith("-"):
                raise UserError(f"{name} is empty")
            return value, argv[:i] + argv[i + (1 if equals else 2) :]
    return "", argv


def pop_flag(argv: list[str], name: str) -> tuple[bool, list[str]]:
    """Whether a flag of one script's own is given, and the other arguments."""
    return name in argv, [argument for argument in argv if argument != name]


def overrides(argv: list[str], but: tuple[str, ...] = ()) -> list[str]:
    """The config's keys that a command line sets, as words of another.

    >>> overrides(["x", "--config=hate:sd15", "--config.dtype=bfloat16", "--config.seed", "1"])
    ['--config.dtype=bfloat16', '--config.seed=1']
    >>> overrides(["--config.remat", "--workdir", "runs/x"])
    ['--config.remat=true']

    Args:
      argv: the command line.
      but: sections or keys that are left out.
    """
    found = []
    for i, word in enumerate(argv):
        key, equals, value = word.partition("=")
        if key.startswith("--config.") and key.split(".")[1] not in but:
            if not equals:
                value = "".join(argv[i + 1 : i + 2])
                value = "true" if not value or value.startswith("--") else value
            found.append(f"{key}={value}")
    return found


def _config_first(arguments: list[str]) -> tuple[list[str], Path]:
    """`--config=FILE` before its overrides, FILE a path or one of ours by name; and the file."""
    for i, argument in enumerate(arguments):
        if argument in ("--config", "-config"):
            given, rest = arguments[i + 1 : i + 2], arguments[:i] + arguments[i + 2 :]
        elif argument.startswith(("--config=", "-config=")):
            given, rest = [argument.split("=", 1)[1]], arguments[:i] + arguments[i + 1 :]
        else:
            continue
        if not any(given):
            raise UserError("--config is empty: give one, as in --config hate")
        if any(word.split("=")[0] in ("--config", "-config") for word in rest):
            raise UserError("--config is there twice: give one")
        path, colon, base = given[0].partition(":")
        ours = ROOT / "configs"
        candidates = (Path(path), ROOT / path, ours / f"{path}.py")
        found = next((p for p in candidates if p.is_file()), None)
        if found is None:
            names = sorted({p.stem for p in ours.glob("*.py")} - {"__init__", "common"})
            raise MissingFileError(
                f"{path}: no such config; give a file, or one of {', '.join(names)} in {ours}"
            )
        if "get_config" not in found.read_text(errors="replace"):
            raise UserError(f"{found}: no config, as it has no get_config(); see {ours}/hate.py")
        return [f"--config={found}{colon}{base}", *rest], found
    return arguments, Path()


def _check_overrides(config: ConfigDict, arguments: list[str]) -> None:
    """Raises UserError for a value that is the next flag, or a section that replaces another."""
    for word, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        key, equals, _ = word.partition("=")
        if not key.startswith("--config."):
            continue
        value: Any = config
        for part in key.split(".")[1:]:
            value = value.get(part) if isinstance(value, ConfigDict) else None
        if isinstance(value, ConfigDict):
            example = next(iter(value))
            raise UserError(f"{key} is a section: set its keys, as in {key}.{example}=...")
        if not equals and following.startswith("--") and value == following:
            raise UserError(f"{key} has no value: is a variable of the shell not set?")


def shown_command(command: str, arguments: list[str]) -> str:
    """A command line as others may see it: no prompts, and the last part of paths from elsewhere.

    Elsewhere is what does not lie below the working directory.

    >>> shown_command("safetydpo train", ["--config", "hate", "--config.model=/home/me/sd15"])
    'safetydpo train --config hate --config.model=sd15'

    Args:
      command: the program.
      arguments: what came after it.
    """
    words, value_is_prompts = [], False
    for word in arguments:
        key, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        if value_is_prompts or (equals and key.endswith(_PROMPTS)):
            value = "..."
        elif value.startswith(("/", "~")) or "://" in value or ".." in Path(value).parts:
            value = Path(value).name
        value_is_prompts = not equals and key.endswith(_PROMPTS)
        words.append(f"{key}{equals}{value}")
    return f"{command} {shlex.join(words)}".strip()


def _is_of_an_override(error: Exception, file: Path) -> bool:
    """Whether an override's key is unknown; the config file's own code may fail the same way."""
    frames = traceback.extract_tb(error.__traceback__)
    cause = error if isinstance(error, LookupError) else error.__context__
    return isinstance(cause, LookupError) and all(
        Path(frame.filename).resolve() != file.resolve() for frame in frames
    )


def _unknown_key(error: Exception) -> UserError:
    # The library quotes the key twice, and advice may follow.
    key, *advice = re.findall(r"[\w.]+(?=\\*['\"])", str(error)) or ["that a flag names"]
    hint = f"did you mean {advice[0]!r}?" if advice else "the config file lists them all"
    return UserError(f"the config has no key {key!r}; {hint}")


def _explained(error: Exception) -> UserError:
    """One line for what went wrong inside the flag library."""
    # A config file's own error comes with its traceback as text: the last line is the message.
    message = str(error).strip().splitlines()[-1].split("UserError: ")[-1]
    if f"--{_PROMPTS}" in str(error):  # it quotes what was given
        return UserError(f"--{_PROMPTS}: write a list of texts, as in \"('a beach', 'a house')\"")
    return UserError(message.removeprefix("flag "))
