"""Configs, overrides and what is said about wrong ones."""

from pathlib import Path

import pytest

from safetydpo_jax.command_line import overrides, read_command_line, shown_command
from safetydpo_jax.errors import MissingFileError, UserError

ROOT = Path(__file__).parents[1]

# The flag library loads config files in a way that Python is going to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def read(*arguments):
    return read_command_line(["train.py", *arguments], "what the script does")


def test_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the config is found from anywhere
    config, workdir = read("--config", "configs/self_harm.py")
    assert (config.category, config.base, config.model) == ("self_harm", "emoji", "emoji")
    assert workdir == Path("runs/self_harm")
    assert read("--config", "configs/emoji_base.py")[1] == Path("runs/emoji_base")


def test_an_override_without_a_value():
    assert overrides(["--config.remat", "--workdir", "runs/x"]) == ["--config.remat=true"]


@pytest.mark.parametrize("first", [True, False])
def test_overrides(first):
    config_flag = [f"--config={ROOT / 'configs/hate.py'}:sd15"]
    overrides = [
        "--config.steps=7",
        "--config.loss.beta",
        "20",
        "--config.report.reveal",
        "--config.lora.targets=('to_q',)",
        "--config.lora.rank=8",
        "--workdir=somewhere",
    ]
    config, workdir = read(*(config_flag + overrides if first else overrides + config_flag))
    assert (config.base, config.steps, config.loss.beta) == ("sd15", 7, 20.0)
    assert (config.report.reveal, tuple(config.lora.targets)) == (True, ("to_q",))
    assert config.lora.rank == 8
    assert workdir == Path("somewhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no config: give one, as in --config hate"),
        (["--config"], "--config is empty"),
        (["--config="], "--config is empty"),
        (["--config=configs/hate.py:sd9"], r"hate.py:sd9: no such base; give one of emoji, sd15"),
        (["--config=configs/common.py"], "missing 1 required positional argument: 'category'"),
        (["--config.bogus=3"], "the config has no key 'bogus'"),
        (["--config.lora.bogus=3"], "the config has no key 'bogus'"),
        (["--config.steps=abc"], r"--config.steps=abc: invalid literal for int\(\)"),
        (["--config.steps=2.5"], "--config.steps=2.5"),
        (["--config.loss.beta=x"], "--config.loss.beta=x: could not convert string to float"),
        (["--config.report.reveal=maybe"], "--config.report.reveal=maybe"),
        (["--config.lora=3"], "--config.lora=3: Failed to parse '3' as a ConfigDict"),
        (["--config.lora={'rank': 5}"], r"--config.lora is a section: .* --config.lora.rank="),
        (["--config.optimiser.learning_rate=1"], "the config has no key 'optimiser'"),
        (["--config.steps.x=1"], "the config has no key"),
        (["--config.lora.targets[9]='to_q'"], "the config has no key"),
        (["--workdir="], "--workdir is empty: is a variable"),
        (["--workdir", "--config.steps=7"], "--workdir is empty: is a variable"),
        (["--config.pairs.path", "--config.steps=7"], "--config.pairs.path has no value"),
        (["--config=configs/violence.py"], "--config is there twice"),
        (["--config", "violence"], "--config is there twice"),
        (["--config.steps"], "Missing value for flag --config.steps"),
        (["--bogus=3"], "Unknown command line flag 'bogus'"),
        (["stray"], "'stray' is no flag"),
    ],
)
def test_bad_command_lines(arguments, message):
    if arguments and arguments[0].split("=")[0] != "--config":
        arguments = ["--config=configs/hate.py", *arguments]
    if "twice" in message:
        arguments = ["--config", "hate", *arguments]
    with pytest.raises(UserError, match=message) as error:
        read(*arguments)
    assert "\n" not in str(error.value)


def test_a_name_stands_for_one_of_our_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, workdir = read("--config", "self_harm")
    assert (config.category, config.base, workdir) == ("self_harm", "emoji", Path("runs/self_harm"))
    config, workdir = read("--config=hate:sd15", "--config.steps=7")
    assert (config.base, config.steps, workdir) == ("sd15", 7, Path("runs/hate"))
    Path("hate").mkdir()  # a folder is no config
    assert read("--config=hate")[0].category == "hate"


def test_a_path_as_given_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "configs" / "hate.py"
    own.parent.mkdir()
    own.write_text((ROOT / "configs" / "violence.py").read_text())
    assert read("--config=configs/hate.py")[0].category == "violence"
    assert read("--config=hate")[0].category == "hate"


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("return None.items()", AttributeError, "'NoneType' object has no attribute 'items'"),
        ("return common.get_config('hate').lora.nothing", AttributeError, "'nothing'"),
        ("common.get_config('hate').stepz = 3", AttributeError, 'Did you mean "steps"'),
        ("import no_such_module", ModuleNotFoundError, "no_such_module"),
        ("return common.get_config('hate', 'sd9')", UserError, "no such base"),
    ],
)
def test_what_a_config_files_own_code_raises(tmp_path, body, error, message):
    """It is a bug there: its traceback says where, and no advice on keys is made of it."""
    file = tmp_path / "mine.py"
    file.write_text(f"from configs import common\n\n\ndef get_config():\n    {body}\n")
    with pytest.raises(error, match=message) as raised:
        read("--config", str(file), "--config.steps=1")
    if error is not UserError:
        assert any(x.path == file for x in raised.traceback)


def test_a_file_that_is_no_config(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("steps = 3\n")
    with pytest.raises(UserError, match=r"mine.py: no config, as it has no get_config\(\)"):
        read("--config", str(file))


def test_a_command_as_others_may_see_it():
    arguments = ["--config", "hate", "--config.model=/home/me/sd15", "--workdir", "~/runs/x"]
    arguments += ["--config.vae=../private/vae", "--config.pairs.path=runs/pairs"]
    arguments += ["--config.health.prompts=('secret',)", "--config.health.prompts", "('secret',)"]
    shown = shown_command("safetydpo train", arguments)
    assert shown == (
        "safetydpo train --config hate --config.model=sd15 --workdir x "
        "--config.vae=vae --config.pairs.path=runs/pairs "
        "--config.health.prompts=... --config.health.prompts ..."
    )


def test_prompts_are_not_quoted_in_an_error():
    with pytest.raises(UserError, match="write a list of texts") as error:
        read("--config", "hate", "--config.health.prompts=it's a secret, a")
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="write a list of texts") as error:
        read("--config", "hate", "--config.health.prompts=('a secret',\n'another secret'")
    assert "secret" not in str(error.value)
    with pytest.raises(UserError, match="a word is no flag") as error:
        read("--config", "hate", "--config.health.prompts", "('a", "secret',)")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("given", ["nope", "nope:sd15", "configs/nope.py"])
def test_a_missing_config(given):
    name = given.removesuffix(":sd15")
    names = (
        "all_experts, all_single, coprov2, emoji_base, harassment, hate, illegal_activity, own, "
        "self_harm, sexual, shocking, violence"
    )
    message = f"{name}: no such config; give a file, or one of {names} in {ROOT / 'configs'}"
    with pytest.raises(MissingFileError) as error:
        read("--config", given)
    assert str(error.value) == message


def test_what_a_command_line_sets():
    argv = [
        "x",
        "--config=hate:sd15",
        "--config.dtype=bfloat16",
        "--config.loss.beta",
        "3",
        "--y=1",
    ]
    argv += ["--config.writer.model=NAME", "--config.seed=1"]
    assert overrides(argv) == [
        "--config.dtype=bfloat16",
        "--config.loss.beta=3",
        "--config.writer.model=NAME",
        "--config.seed=1",
    ]
    assert overrides(argv, but=("writer", "seed")) == overrides(argv)[:2]
