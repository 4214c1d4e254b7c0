"""The file of a harm of the user's: what it may say, and what is said about a wrong one."""

import re
from pathlib import Path

import pytest

from configs import common
from safetydpo_jax.data import source_of
from safetydpo_jax.emoji.own_harm import embedded
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.harm import Harm, HarmPair, read_harm
from safetydpo_jax.train.settings import resolve

EXAMPLE = Path(__file__).parents[1] / "examples" / "gambling.yaml"
DOCS = Path(__file__).parents[1] / "docs" / "own_harm.md"
SECRET = "a secret thing"
CONCEPTS = f"concepts:\n- {{unsafe: {SECRET}, safe: gift}}\n"


def read(tmp_path, text, name="harm.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return read_harm(str(path))


def test_the_example():
    assert read_harm(str(EXAMPLE)) == Harm(
        "gambling",
        (
            HarmPair("slot machine", "television"),
            HarmPair("dice", "gift"),
            HarmPair("flying money", "envelope"),
            HarmPair("money bag", "backpack", held_out=True),
        ),
    )


def test_what_the_docs_show(tmp_path):
    """The example, and a harm of prompts: both can be drawn by the embedded model."""
    shown = re.findall(r"```yaml\n(.+?)```", DOCS.read_text(), re.DOTALL)
    example, halls = (read(tmp_path, text, f"{i}.yaml") for i, text in enumerate(shown))
    assert example == read_harm(str(EXAMPLE)) == embedded(example, "")
    assert embedded(halls, "").concepts == (HarmPair("slot machine", "television"),)


def test_prompts_and_what_to_preserve(tmp_path):
    text = """
name: my_harm-2
prompts:
- unsafe: a man at a
    slot machine
  safe: a man at an arcade game
- {unsafe: a man at a slot machine, safe: "a man: at a loom"}
preserve: ["a photo of a beach "]
"""
    harm = read(tmp_path, text)
    assert harm.name == "my_harm-2"
    assert harm.prompts[0] == ("a man at a slot machine", "a man at an arcade game")
    assert harm.prompts[1][1] == "a man: at a loom"
    assert harm.preserve == ("a photo of a beach",)
    assert (harm.concepts, harm.names) == ((), frozenset())


def test_a_folder(tmp_path):
    for name in ("yaml", "from-csv", "both", "neither"):
        (tmp_path / name).mkdir()
    for name in ("yaml", "both"):
        (tmp_path / name / "harm.yaml").write_text("name: thing\n" + CONCEPTS)
    for name in ("from-csv", "both"):
        text = '\ufeffunsafe,safe\n"one, two",three\nfour,five\n'
        (tmp_path / name / "prompts.csv").write_text(text)
    assert read_harm(str(tmp_path / "yaml")).name == "thing"
    assert read_harm(str(tmp_path / "from-csv")) == Harm(
        "from-csv", prompts=(("one, two", "three"), ("four", "five"))
    )
    for name in ("both", "neither"):
        with pytest.raises(UserError, match=f"harm.yaml or prompts.csv, this has {name}"):
            read_harm(str(tmp_path / name))


def test_a_run_reads_its_file_once(tmp_path):
    path = tmp_path / "harm.yaml"
    path.write_text("name: before\n" + CONCEPTS)
    assert read_harm(str(path)).name == "before"
    path.write_text("name: after\n" + CONCEPTS)
    assert read_harm(str(path)).name == "before"


@pytest.mark.parametrize(
    "value", [f"!!bool {SECRET}", f"!!timestamp {SECRET}", "!!int ''", f"!!float {SECRET}"]
)
def test_tags_that_do_not_fit(tmp_path, value):
    with pytest.raises(UserError, match=r"not valid YAML.*docs/own_harm.md") as error:
        read(tmp_path, f"name: x\nconcepts:\n- unsafe: {value}\n  safe: gift\n")
    assert SECRET not in str(error.value)


def test_the_example_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_harm("examples/gambling.yaml").name == "gambling"


def test_a_missing_file(tmp_path):
    with pytest.raises(
        MissingFileError, match=r"no.yaml: there is no such file; .*docs/own_harm.md"
    ):
        read_harm(str(tmp_path / "no.yaml"))


PAIR = f"{{unsafe: {SECRET}, safe: gift}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"name: x\nconcepts: [{SECRET}", "harm.yaml, line 2: not valid YAML"),
        (f"name: x\nconcepts:\n- unsafe: {SECRET}: b", "harm.yaml, line 3: not valid YAML"),
        (f"name: {SECRET}\nname: x\n" + CONCEPTS, "line 1: .* a key given twice"),
        ("name: 2024-13-45", "harm.yaml: not valid YAML"),
        ("\0", "harm.yaml: not valid YAML"),
        ("", "must have the keys name and concepts or prompts; .*docs/own_harm.md shows"),
        (SECRET, "must have the keys name and concepts or prompts"),
        (CONCEPTS, "has no name: give the harm one"),
        ("name: 3\n" + CONCEPTS, "the name must be 1 to 40 letters.* in quotes if it is a number"),
        (f"name: ../{SECRET}\n" + CONCEPTS, "the name must be 1 to 40 letters, digits, _ and -"),
        ("name: All\n" + CONCEPTS, "the name All is taken, as is all or safe"),
        ("name: safe\n" + CONCEPTS, "the name safe is taken"),
        (
            "name: x\nconcept: []",
            "harm.yaml: unknown key .did you mean concepts..; .* concepts, prompts",
        ),
        (f"name: x\n{SECRET}: []", r"unknown key; the keys are"),
        ("name: x", "has neither concepts nor prompts"),
        ("name: x\nconcepts: []", "concepts is empty; give an entry, or leave concepts out"),
        (f"name: x\nconcepts: [{PAIR}]\npreserve: []", "preserve is empty"),
        (f"name: x\nconcepts: {SECRET}", "concepts must be a list of entries, each after a dash"),
        ("name: x\nprompts:", "prompts must be a list of entries"),
        (f"name: x\nconcepts: [{PAIR}, {SECRET}]", "entry 2 of concepts must have the keys"),
        (f"name: x\nconcepts: [{{unsafe: {SECRET}}}]", "entry 1 of concepts has no 'safe'"),
        (f"name: x\nconcepts: [{{safe: {SECRET}}}]", "entry 1 of concepts has no 'unsafe'"),
        (f"name: x\nconcepts: [{{unsafe: {SECRET}, safe: no}}]", "entry 1 of concepts, 'safe' m"),
        (f"name: x\nprompts: [{{unsafe: '', safe: {SECRET}}}]", "entry 1 of prompts, 'unsafe' mu"),
        (f"name: x\nconcepts: [{PAIR}]\npreserve: [3]", "entry 1 of preserve must be a text"),
        (
            f"name: x\nprompts: [{{unsafe: {SECRET}, safe: b, held_out: true}}]",
            "entry 1 of prompts: unknown key; the keys are unsafe, safe",
        ),
        (
            f"name: x\nconcepts: [{{unsafe: {SECRET}, safe: b, held_out: 1}}]",
            "entry 1 of concepts: 'held_out' must be true or false",
        ),
        (
            f"name: x\nconcepts: [{{unsafe: {SECRET}, safe: A  Secret thing}}]",
            "entry 1 of concepts: 'unsafe' and 'safe' are the same",
        ),
        (
            f"name: x\nconcepts: [{PAIR}, {{unsafe: a Secret thing, safe: other}}]",
            "entry 2 of concepts repeats entry 1",
        ),
        (f"name: x\nprompts: [{PAIR}, {PAIR}]", "entry 2 of prompts repeats entry 1"),
        (
            f"name: x\nconcepts: [{PAIR}]\npreserve: [b, {SECRET}, {SECRET}]",
            "entry 3 of preserve repeats entry 2",
        ),
        (
            f"name: x\nconcepts: [{{unsafe: {SECRET}, safe: b, held_out: true}}]",
            "all concepts are held out; leave one at least to train on",
        ),
        (
            f"name: x\nconcepts: [{PAIR}, {{unsafe: b, safe: {SECRET}}}]",
            "entry 2 of concepts: its 'safe' is the 'unsafe' of entry 1",
        ),
    ],
)
def test_what_cannot_be(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, text)
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_may_have_two_twins_and_all_concepts_be_held_out_beside_prompts(tmp_path):
    text = f"""
name: x
concepts: [{{unsafe: {SECRET}, safe: gift, held_out: true}}]
prompts: [{{unsafe: a, safe: b}}, {{unsafe: a, safe: c}}]
"""
    assert read(tmp_path, text).prompts == (("a", "b"), ("a", "c"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line lacks the column unsafe and safe; it must name the columns"),
        (f"{SECRET},safe\n", "the first line lacks the column unsafe; it must name the columns"),
        ("unsafe,safe,safe\na,b,c\n", "the first line names the column safe twice"),
        (f"unsafe,safe\na,b\n{SECRET},b,c\n", "prompts.csv, line 3: not as many fields .* quotes"),
        (f"unsafe,safe\n{SECRET}\n", "prompts.csv, line 2: not as many fields"),
        (f'unsafe,safe\n"{SECRET},b\n', "prompts.csv, line 2: not valid CSV"),
        (f"unsafe,safe\n{SECRET},\n", "entry 1 of prompts, 'safe' must be a text"),
        ("unsafe,safe\n", "no rows below its first line"),
    ],
)
def test_a_wrong_table(tmp_path, text, message):
    folder = tmp_path / "thing"
    folder.mkdir()
    (folder / "prompts.csv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_harm(str(folder))
    assert SECRET not in str(error.value)


def test_what_is_no_text(tmp_path):
    (tmp_path / "harm.yaml").write_bytes(b"name: \xff")
    with pytest.raises(UserError, match="harm.yaml: the file is not UTF-8 text"):
        read_harm(str(tmp_path))


def test_a_file_of_one_of_the_categories(tmp_path):
    """Another model than the embedded one has no prompts of its own for it."""
    folder = tmp_path / "hate"
    folder.mkdir()
    (folder / "prompts.csv").write_text("unsafe,safe,concept\nbad,good,hate-0000\n")
    for config in (common.get_config("hate", "sd15"), common.get_config("own", "sd15")):
        config.harm = str(folder)
        config = resolve(config, pairs_only=True)
        assert config.category == "hate"
        ((unsafe, safe),) = source_of(config).pairs(1, 0)
        assert (unsafe.text, safe.text) == ("bad", "good")
    config = common.get_config("violence", "sd15")
    config.harm = str(folder)
    with pytest.raises(UserError, match="but the config is that of violence"):
        resolve(config, pairs_only=True)
    config = common.get_config("hate")
    config.harm = str(folder)
    with pytest.raises(UserError, match="hate is that of one of the embedded model's own harms"):
        resolve(config)
