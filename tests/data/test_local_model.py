"""Prompts from a model of transformers: a tiny one that was taught what to answer."""

import csv
import json
import shutil
from dataclasses import replace

import pytest
import tokenizers
import torch
import transformers

from safetydpo_jax.data.writing import Settings, judge, write_prompts
from safetydpo_jax.data.writing.answers import PromptPair
from safetydpo_jax.data.writing.local_model import LocalModel
from safetydpo_jax.errors import UserError

PAIR = {"unsafe": "a man with a dagger", "safe": "a man with a flower"}
TEMPLATES = {"template": "{concept} {count}", "judge_template": "{prompts}"}


def make_tokenizer(template):
    """Of bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "<end>", "<user>", "<model>"])}
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<end>", "<user>", "<model>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<end>", chat_template=template
    )


def taught(tokenizer, answers):
    """A small Llama that has learnt the answer to each question by heart."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    rows = [tokenizer(f"<user>{q}<model>{a}<end>").input_ids for q, a in answers.items()]
    length = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    labels = ids.clone()
    for row, label in zip(rows, labels, strict=True):
        label[: row.index(tokenizer.convert_tokens_to_ids("<model>")) + 1] = -100
        label[len(row) :] = -100
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model's, and those of two that cannot be used."""
    folder = tmp_path_factory.mktemp("models")
    asked = judge.question(TEMPLATES["judge_template"], "hate", [PromptPair(**PAIR)], seed=0)
    verdicts = [{"id": x["id"], "unsafe": x["prompt"] == PAIR["unsafe"]} for x in json.loads(asked)]
    tokenizer = make_tokenizer(
        "{% for m in messages %}<user>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<model>{% endif %}"
    )
    answers = {"secretword 1": f"Yes: {json.dumps([PAIR])}", asked: json.dumps(verdicts)}
    model = taught(tokenizer, answers)
    for name, template in (("good", tokenizer.chat_template), ("bare", None)):
        model.save_pretrained(folder / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / name)
    (folder / "pickled").mkdir()
    for file in (folder / "good").iterdir():
        if file.suffix != ".safetensors":
            (folder / "pickled" / file.name).write_bytes(file.read_bytes())
    torch.save(model.state_dict(), folder / "pickled" / "pytorch_model.bin")
    shutil.copytree(folder / "good", folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"x" * 100)
    return folder


@pytest.fixture
def settings(folder, tmp_path):
    (tmp_path / "concepts.csv").write_text("category,concept\nhate,secretword\n")
    templates = {}
    for name, text in TEMPLATES.items():
        templates[name] = tmp_path / name
        templates[name].write_text(text)
    return Settings(
        tmp_path / "concepts.csv",
        tmp_path / "out",
        "",
        str(folder / "good"),
        per_concept=1,
        temperature=0.0,
        attempts=1,
        **templates,
    )


def test_it_writes_and_judges(settings):
    said = []
    report = write_prompts(settings, said.append)
    assert report["unanswered_ids"] == {}
    with (settings.out / "hate" / "prompts.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [PAIR | {"concept": "hate-0000"}]
    assert not any(PAIR["unsafe"] in line for line in said)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bare", "has no chat template"),
        ("pickled", "cannot be read as a language model of transformers"),
        ("damaged", "cannot be read as a language model of transformers"),
        ("none", "cannot be read as a language model of transformers"),
    ],
)
def test_models_that_cannot_be_used(settings, folder, name, message):
    with pytest.raises(UserError, match=message):
        write_prompts(replace(settings, model=str(folder / name)), lambda line: None)


def test_a_question_that_is_too_long(settings):
    settings.template.write_text("{concept} {count} " + "x" * 600)
    with pytest.raises(UserError, match="no pair could be used"):
        write_prompts(settings, lambda line: None)
    report = json.loads((settings.out / "report.json").read_text())
    assert report["unanswered"] == {"question of more tokens than the model takes": 1}


def test_no_temperature_is_no_chance(settings, folder):
    import asyncio

    file = folder / "good" / "generation_config.json"
    wish = {"do_sample": True, "temperature": 50.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | wish))
    model = LocalModel(str(folder / "good"))
    asked = [model.ask("secretword 1", seed=seed, temperature=0.0) for seed in range(3)]
    assert {asyncio.run(answer) for answer in asked} == {f"Yes: {json.dumps([PAIR])}"}
    wild = model.ask("secretword 1", seed=0, temperature=50.0)
    assert asyncio.run(wild) != f"Yes: {json.dumps([PAIR])}"
