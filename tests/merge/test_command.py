"""launch/merge.py from the command line to files that diffusers reads."""

import csv
import json
import os
import re

import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from launch import merge
from safetydpo_jax import lora
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.merge import command
from safetydpo_jax.merge.prompts import read_prompts


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["category", "prompt"])
        rows.writerows([(c, f"secret {i}") for c in ("hate", "violence") for i in range(2)])
    return path


def run(*arguments):
    merge.main([str(x) for x in arguments])


def change(path, pipeline):
    flat = traverse_util.flatten_dict(lora.load_lora(path, pipeline.unet_params)[0])
    return {
        k[:-1]: np.asarray(a).reshape(-1, a.shape[-1]) @ np.asarray(flat[(*k[:-1], "b")])
        for k, a in flat.items()
        if k[-1] == "a"
    }


def test_distilled(kept_files, pipeline, model_folder, tmp_path, capsys):
    prompts, out = tmp_path / "taught.csv", tmp_path / "out" / "merged.safetensors"
    names = ("hate", "violence", "shocking", "safe")
    rows = [f"{name},secret {i}" for name in names for i in range(2)]
    prompts.write_text("\n".join(["category,prompt", *rows]))
    given = ("--method", "svd", "--rank", 3, "--model", model_folder, "--prompts", prompts,
             "--steps", 3, "--guidance_scale", 4, "--distill", 2,
             "--distill_batch_size", 8)  # fmt: skip
    run("--experts", *kept_files, *given, "--out", out)
    said = capsys.readouterr().out
    assert "secret" not in said
    assert "distillation: 8/8 pictures drawn" in said
    assert "distillation: 2/2 steps" in said
    merged = tmp_path / "merged.safetensors"
    run("--experts", *kept_files, *given[:6], "--out", merged)
    _, header = lora.load_lora(out, pipeline.unet_params)
    lessons = json.loads(header["distillation"])
    assert (lessons["steps"], lessons["batch_size"], lessons["num_steps"]) == (2, 8, 3)
    assert (lessons["sampler"], lessons["guidance_scale"]) == ("ddim", 4.0)
    taught, untaught = (change(path, pipeline) for path in (out, merged))
    assert any(np.abs(taught[layer] - untaught[layer]).max() > 1e-3 for layer in taught)
    assert sorted(path.name for path in out.parent.iterdir()) == ["merged.png", out.name]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--distill", 5), "--distill trains the result: give the base as --model"),
        (("--distill_rate", 0.1), "there is no --distill STEPS"),
        (("--distill", 5, "--model", "emoji", "--distill_batch_size", 3), "it must be even"),
        (("--distill", -1, "--model", "emoji"), "steps is -1"),
        (
            ("--distill", 5, "--model", "emoji", "--distill_batch_size", 4),
            "distill_batch_size is 4, which does not divide over 8 devices",
        ),
    ],
)
def test_wrong_distillation(kept_files, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        run(
            "--experts", *kept_files, "--method", "svd", "--out", tmp_path / "x.safetensors", *given
        )


def test_co_merge_and_again_from_its_votes(
    files, prompts, pipeline, model_folder, tmp_path, capsys
):
    out = tmp_path / "out" / "merged.safetensors"
    run("--experts", *files, "--model", model_folder, "--prompts", prompts, "--steps", 4,
        "--sampler", "euler", "--guidance_scale", 4, "--rank", 3, "--out", out)  # fmt: skip
    said = capsys.readouterr().out
    assert "secret" not in said
    assert "of the outputs have the same winner" in said
    assert f"written: {out}, merged.png" in said
    names = {"merged.safetensors", "merged.png", "merged.stats.safetensors"}
    assert {path.name for path in out.parent.glob("merged*")} == names
    assert "won by" in said
    _, header = lora.load_lora(out, pipeline.unet_params)
    assert (header["method"], header["rank"]) == ("co_merge", "3")
    counted = json.loads(header["statistics"])
    assert (counted["trajectory"], counted["sampler"]) == ("base", "euler")
    assert (counted["num_steps"], counted["guidance_scale"]) == (4, 4.0)
    assert [x["name"] for x in json.loads(header["experts"])] == ["hate", "violence", "shocking"]
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.size[0] >= 720
    again = tmp_path / "again.safetensors"
    run("--experts", *files, "--model", model_folder, "--rank", 3, "--out", again,
        "--stats", out.with_suffix(".stats.safetensors"))  # fmt: skip
    assert re.search(r"most alike: \w+ and \w+, cosine -?0\.\d+, \d+ % of", capsys.readouterr().out)
    weighed = tmp_path / "weighed.safetensors"
    run("--experts", *files, "--model", model_folder, "--rank", 3, "--out", weighed,
        "--stats", out.with_suffix(".stats.safetensors"), "--category_weights", "hate=0",
        "--band_weights", 0, 0, 0, 1)  # fmt: skip
    assert lora.load_lora(weighed, pipeline.unet_params)[1]["category_weights"] == '["hate=0"]'
    layers = change(out, pipeline)
    assert any(np.abs(layers[x] - y).max() > 1e-3 for x, y in change(weighed, pipeline).items())
    with pytest.raises(UserError, match="'hate' is no category with a number, as in hate=2"):
        run("--experts", *files, "--model", model_folder, "--out", weighed,
            "--stats", out.with_suffix(".stats.safetensors"),
            "--category_weights", "hate")  # fmt: skip
    one, two = change(out, pipeline), change(again, pipeline)
    for layer, matrix in one.items():
        np.testing.assert_allclose(matrix, two[layer], atol=1e-5)


def test_what_was_counted_outlives_a_merge_that_failed(
    files, prompts, model_folder, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "merged.safetensors"
    options = ("--experts", *files, "--model", model_folder, "--prompts", prompts, "--steps", 2,
               "--out", out)  # fmt: skip

    def fail(*args, **kwargs):
        raise UserError("the disk is full")

    with monkeypatch.context() as context:
        context.setattr(command, "save_lora", fail)
        with pytest.raises(UserError, match="the disk is full"):
            run(*options)
    capsys.readouterr()
    run(*options)
    said = capsys.readouterr().out
    assert "statistics: going on from prompt" in said
    assert " prompts, 0 s left" not in said  # none was drawn again
    counted = out.with_suffix(".counting.safetensors")
    assert not counted.exists()
    counted.write_bytes(b"of a count that goes on later")
    run("--experts", *files, "--model", model_folder, "--method", "svd", "--out", out)
    assert counted.exists()


def test_regmean_and_again_from_what_was_seen(twins, pipeline, model_folder, tmp_path, capsys):
    table, out = tmp_path / "prompts.csv", tmp_path / "merged.safetensors"
    rows = [f"{name},secret {i}" for name in ("twin0", "twin1", "safe") for i in range(2)]
    table.write_text("\n".join(["category,prompt", *rows]))
    options = ("--experts", *twins, "--model", model_folder, "--rank", 2)
    run(*options, "--method", "regmean", "--prompts", table, "--steps", 4, "--out", out)
    assert "secret" not in capsys.readouterr().out
    stats, again = out.with_suffix(".stats.safetensors"), tmp_path / "again.safetensors"
    run(*options, "--method", "regmean", "--stats", stats, "--out", again)
    assert any(matrix.any() for matrix in change(out, pipeline).values())
    for layer, matrix in change(out, pipeline).items():
        np.testing.assert_allclose(matrix, change(again, pipeline)[layer], atol=1e-5)
    run(*options, "--method", "regmean", "--stats", stats, "--preservation", 1e6, "--out", again)
    for layer, matrix in change(again, pipeline).items():
        assert np.linalg.norm(matrix) < 0.5 * np.linalg.norm(change(out, pipeline)[layer])
    capsys.readouterr()
    run(*options, "--prompts", table, "--steps", 4, "--out", out)  # votes alone
    assert "statistics: of 4 prompts" in capsys.readouterr().out  # the safe ones have none
    with pytest.raises(UserError, match="the statistics have no inputs of this layer"):
        run(*options, "--method", "regmean", "--stats", stats, "--out", again)


def test_a_recipe_stands_for_the_options(files, pipeline, model_folder, tmp_path):
    recipe = files[0].parent / "merge.yaml"
    model = os.path.relpath(model_folder, recipe.parent)
    recipe.write_text(
        "experts:\n"
        f"  - {files[0].name}\n"
        f"  - {{file: {files[1].name}, weight: 5e-1}}\n"
        "method: ties\ndensity: 5e-1\nrank: 4\n"
        f"model: {model}\nout: merged.safetensors\n"
    )
    run("--recipe", recipe)
    other = tmp_path / "other.safetensors"
    run("--experts", files[0], files[1], "--weights", 1, 0.5, "--method", "ties", "--density", 0.5,
        "--rank", 4, "--model", model_folder, "--out", other)  # fmt: skip
    assert (files[0].parent / "merged.safetensors").read_bytes() == other.read_bytes()
    run("--recipe", recipe, "--rank", 2, "--out", other)  # the command line counts
    assert lora.load_lora(other, pipeline.unet_params)[1]["rank"] == "2"
    run("--recipe", recipe, "--experts", files[1], files[0], "--out", other)
    named = json.loads(lora.load_lora(other, pipeline.unet_params)[1]["experts"])
    assert [expert["weight"] for expert in named] == [1, 1]  # weights are of the recipe's experts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methot: ties", "there is no option 'methot'; did you mean 'method'?"),
        ("recipe: x", "there is no option 'recipe'"),
        ("- a", "a recipe is a table of options"),
        ("method: [", "not valid YAML"),
        ("method: ties\nmethod: dare", "or a key given twice"),
        ("rank: four", "merge.yaml, rank: it must be a whole number, not 'four'"),
        ("rank: true", "it must be a whole number"),
        ("scale: [1]", "it must be a number"),
        ("out: gs://b/m.safetensors", "merge.yaml, out: 'gs://b/m.safetensors' is an address"),
        ("weights: 1", "merge.yaml, weights: it must be a list"),
        ("dtype: float16", "merge.yaml, dtype: 'float16' is none of float32, bfloat16"),
        ("experts: a", "experts must be a list of files"),
        ("experts: [{weight: 1}]", "expert 1: give a file"),
        ("experts: [{file: a, wait: 1}]", "expert 1: there is no key 'wait'"),
        ("experts: [{file: a, weight: x}]", "expert 1: the weight must be a number"),
    ],
)
def test_recipes_that_are_none(tmp_path, text, message):
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(text)
    with pytest.raises(UserError, match=message.replace("?", r"\?").replace("[", r"\[")):
        run("--recipe", recipe)


def test_what_is_refused_before_any_work(files, prompts, model_folder, tmp_path):
    out = ("--out", tmp_path / "m.safetensors")
    model = ("--model", model_folder)
    experts = ("--experts", *files)
    counts = (*experts, *out, *model, "--prompts", prompts)
    for arguments, message in (
        ((*experts,), "no --out"),
        ((*experts, "--out", "m.bin", *model), "its name must end in .safetensors"),
        ((*out, *model), "no experts"),
        ((*experts, *out), "co_merge asks which expert is active where"),
        ((*experts, *out, "--method", "mean"), "the method is 'mean'"),
        ((*experts, *out, "--method", "average", "--density", 1), "average has no option 'density"),
        ((*experts, *out, *model), "no --prompts: give a CSV"),
        (
            (*experts, *out, "--method", "ties", "--band_weights", 1, 1, 1, 1),
            "--band_weights weighs votes, which ties does not ask for",
        ),
        (
            (*experts, *out, "--method", "average"),
            r"It was held against emoji, sd15, .* as --model",
        ),
        ((*experts, *out, *model, "--stats", files[0]), "holds no statistics"),
        ((*experts, *out, *model, "--weights", 1), "1 weights for 3 experts"),
        ((*experts, *out, *model, "--prompts", files[0]), "is not UTF-8 text"),
        ((*experts, *out, *model, "--prompts", prompts, "--num_prompts", 0), "must be 1 or more"),
        ((*experts, *out, "--method", "dare", "--seed", -1), "--seed -1: it must be 0 or more"),
        ((*experts, *out, "--method", "svd", "--rank", 0), "the rank is 0: it must be at least 1"),
        ((*experts, *out, "--method", "svd", "--scale", "nan"), "--scale nan: it must be a finite"),
        ((*counts, "--category_weights", "other=2"), "no prompts of other vote: the categories"),
        ((*counts, "--band_weights", 1, 2), "2 weights for 4 bands of timesteps"),
        ((*counts, "--batch_size", 0), "the batch size is 0: it must be 1 or more"),
        ((*counts, "--method", "svd"), "--prompts says how to count, but svd counts nothing"),
        (
            (*experts, *out, "--stats", files[0], "--trajectory", "experts"),
            "--trajectory says how to count, but --stats has what was counted",
        ),
        ((*counts, "--method", "co_merge_rows"), "from experts of one rank and the same layers"),
        ((*counts, "--distill", 5), "no prompts of .*safe"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)
    for arguments in (
        ("--recipe", tmp_path / "gone.yaml"),
        (*experts, *out, *model, "--stats", tmp_path / "gone.safetensors"),
        (*experts, *out, *model, "--prompts", tmp_path / "gone.csv"),
        ("--experts", tmp_path / "gone.safetensors", *out, "--method", "average"),
    ):
        with pytest.raises(MissingFileError, match="gone"):
            run(*arguments)
    assert not list(tmp_path.glob("m.*"))  # nor was anything counted


def test_the_first_prompts_of_each_category(tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text("category,prompt\nhate,a\nhate,b\nsafe,c\nhate,d\n")
    assert read_prompts(table) == (["a", "b", "c", "d"], ["hate", "hate", "safe", "hate"])
    assert read_prompts(table, 2) == (["a", "b", "c"], ["hate", "hate", "safe"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind,prompt\na,b\n", "the first line lacks the column category"),
        ("category,prompt\n", "the table has no rows"),
        ("category,prompt\nhate,secret, b\n", "line 2: not as many fields"),
        ("category,prompt\nhate,\n", "line 2: the column prompt is empty"),
        ("category,prompt,prompt\nhate,a,b\n", "names the column prompt twice"),
        ("category,prompt\nhate,secret\n", "fewer than two prompts of hate"),
    ],
)
def test_tables_of_prompts_that_are_none(files, model_folder, tmp_path, text, message):
    table = tmp_path / "prompts.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        run("--experts", *files, "--model", model_folder, "--prompts", table,
            "--out", tmp_path / "m.safetensors")  # fmt: skip
    assert "secret" not in str(error.value)
