"""The command line of launch/sample.py; the models are replaced, their own tests cover them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from launch import sample
from safetydpo_jax.errors import MissingFileError, UserError

SECRET = "a secret prompt"


@pytest.fixture
def drawn(monkeypatch):
    """Puts a fast stand-in where the model is; returns the list of (prompt, seed) it drew."""
    calls = []

    def draw_solid(requests, arguments):
        for request in requests:
            calls.append((request.prompt, request.seed))
            sample.write_picture(request.path, np.full((8, 8, 3), request.seed, np.uint8))

    monkeypatch.setattr(sample, "draw", draw_solid)
    return calls


def write_table(folder: Path, text: str) -> Path:
    path = folder / "prompts.csv"
    path.write_bytes(text.encode())
    return path


def run(table: Path, out: Path, *more: str) -> None:
    sample.main(["--model", "x", "--prompts", str(table), "--out", str(out), *more])


def test_help_is_quick_and_needs_no_model():
    """How quick depends on what else the machine does: what would take seconds is not loaded."""
    script = (
        "import sys, launch.sample as s\n"
        "try:\n    s.main(['--help'])\n"
        "except SystemExit:\n    assert not {'jax', 'numpy', 'PIL'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for option in ("--model", "--prompts", "--prompt", "--lora", "--out", "--grid", "--scale"):
        assert option in result.stdout


def test_pictures_get_their_names_and_seeds_and_prompts_stay_unsaid(tmp_path, drawn, capsys):
    rows = f'prompt,image,seed,category\n"{SECRET}, twice",b.png,7,x\n{SECRET},in/a.jpg,,y\n'
    out = tmp_path / "out"
    run(write_table(tmp_path, "\ufeff" + rows), out, "--seed", "40", "--grid")
    assert drawn == [(f"{SECRET}, twice", 7), (SECRET, 41)]
    assert (np.asarray(Image.open(out / "b.png")) == 7).all()
    with Image.open(out / "in/a.jpg") as picture:
        assert picture.format == "JPEG"
    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape == (8, 16, 3)
    assert grid[:, :8].mean() == 7
    said = "".join(capsys.readouterr())
    assert said.endswith(f"2 pictures are in {out}\n")
    assert SECRET not in said


def test_an_interrupted_run_goes_on(tmp_path, drawn, capsys):
    table = write_table(tmp_path, "prompt,image\np,a.png\nq,b.png\nr,c.png\n")
    out = tmp_path / "out"
    run(table, out)
    (out / "b.png").rename(out / "b.png.part")  # killed while it wrote b
    run(table, out)
    assert drawn == [("p", 0), ("q", 1), ("r", 2), ("q", 1)]
    pictures = ["a.png", "b.png", "c.png"]
    assert sorted(path.name for path in out.iterdir()) == [sample.DRAWN, *pictures]
    assert "2 of 3 pictures are already in" in capsys.readouterr().out


def test_pictures_of_another_lora_are_not_mixed_with_these(tmp_path, drawn):
    table, out = write_table(tmp_path, "prompt,image\np,a.png\nq,b.png\n"), tmp_path / "out"
    lora = tmp_path / "lora.safetensors"
    train = lambda value: safetensors.numpy.save_file({"x": np.full(1, value)}, lora)  # noqa: E731
    train(1.0)
    run(table, out, "--lora", str(lora))
    (out / "b.png").unlink()
    train(2.0)
    with pytest.raises(UserError, match=r"out was made with lora = .* or give another --out"):
        run(table, out, "--lora", str(lora))
    with pytest.raises(UserError, match=r"lora = .*, but now it is None"):
        run(table, out)
    train(1.0)
    with pytest.raises(UserError, match=r"steps = 25, but now it is 3"):
        run(table, out, "--lora", str(lora), "--steps", "3")
    run(table, out, "--lora", str(lora), "--batch_size", "1")
    assert [prompt for prompt, _ in drawn] == ["p", "q", "q"]
    other = tmp_path / "other.csv"
    other.write_text("prompt,image\nr,c.png\n")
    with pytest.raises(UserError, match=r"lora = .*, but now it is None"):
        run(other, out)
    (out / "a.png").unlink()
    (out / "b.png").unlink()
    run(table, out)  # nothing is there to be mixed with
    assert [prompt for prompt, _ in drawn][3:] == ["p", "q"]


def test_one_prompt_is_drawn_anew(tmp_path, drawn):
    for prompt in ("p", "q"):
        arguments = ["--model", "x", "--prompt", prompt, "--out", str(tmp_path), "--seed", "3"]
        sample.main(arguments)
    assert drawn == [("p", 3), ("q", 3)]
    assert [path.name for path in tmp_path.iterdir()] == ["picture_3.png"]


def test_what_cannot_be_written_is_told_before_anything_is_drawn(tmp_path, drawn):
    (tmp_path / "picture_3.png").mkdir()
    with pytest.raises(UserError, match=r"could not write .*picture_3\.png \(it is a folder\)"):
        sample.main(["--model", "x", "--prompt", "p", "--out", str(tmp_path), "--seed", "3"])
    assert not drawn


def test_a_damaged_picture_in_the_grid_is_named(tmp_path, drawn):
    table, out = write_table(tmp_path, "prompt,image\np,a.png\nq,b.png\n"), tmp_path / "out"
    run(table, out)
    (out / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.png is no whole picture: remove it"):
        run(table, out, "--grid")


HEADER = "prompt,image,seed\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the column prompt and image"),
        ("prompt,file\nsecret,a.png\n", "lacks the column image"),
        (HEADER, "no rows below"),
        (HEADER + "secret,/tmp/a.png,1\n", "line 2.*leads out of --out"),
        (HEADER + "secret,../a.png,1\n", "line 2.*leads out of --out"),
        (HEADER + "secret,x/../../a.png,1\n", "leads out of --out"),
        (HEADER + "secret,..\\a.png,1\n", "leads out of --out"),
        (HEADER + "secret,link/a.png,1\n", "led away by a link"),
        (HEADER + "secret,folder.png,1\n", "is a directory"),
        (HEADER + "secret,a\0.png,1\n", "control character"),
        (HEADER + "secret,,1\n", "is empty"),
        (HEADER + "secret,a.gif,1\n", "does not end in .png"),
        (HEADER + "secret," + "a" * 300 + ".png,1\n", "longer than 200 bytes"),
        (HEADER + "secret,grid.png,1\n", "is that of the --grid"),
        (HEADER + "p,a.png,1\nsecret,./a.png,2\n", "line 3.*repeats the name of line 2"),
        (HEADER + "p,a.png,1\nsecret, with comma,b.png,2\n", "line 3.*not as many fields"),
        (HEADER + "secret,a.png\n", "not as many fields"),
        (HEADER + "p,a.png,secret\n", "line 2: the seed must be a whole number"),
        (HEADER + "secret,a.png,-1\n", "seed must be"),
        (HEADER + f"secret,a.png,{2**32}\n", "seed must be"),
        (HEADER + "secret,a.png," + "9" * 5000 + "\n", "seed must be"),
        (HEADER + '"secret"x,a.png,1\n', "not valid CSV"),
    ],
)
def test_bad_tables(tmp_path, drawn, text, message):
    out = tmp_path / "out"
    (out / "folder.png").mkdir(parents=True)
    (out / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        run(write_table(tmp_path, text), out, "--grid")
    assert "secret" not in str(caught.value)
    assert not drawn


def test_bad_arguments(tmp_path, drawn, capsys):
    with pytest.raises(MissingFileError, match="no such file"):
        run(tmp_path / "missing.csv", tmp_path / "out")
    latin = tmp_path / "latin.csv"
    latin.write_bytes(b"prompt,image\n\xff\xfe,a.png\n")
    with pytest.raises(UserError, match="not UTF-8"):
        run(latin, tmp_path / "out")
    table = write_table(tmp_path, "prompt,image\np,a.png\n")
    with pytest.raises(UserError, match="cannot make this directory"):
        run(table, table)
    with pytest.raises(UserError, match="--seed: the seed must be"):
        run(table, tmp_path / "out", "--seed", "-1")
    for more in (
        ["--scale", "2"],
        ["--prompt", "p"],
        ["--steps", "many"],
        ["--sampler", "x"],
    ):
        with pytest.raises(SystemExit) as caught:
            run(table, tmp_path / "out", *more)
        assert caught.value.code == 2
    with pytest.raises(SystemExit):
        run(table, tmp_path / "out", "--guidance_rescale", "2")
    assert "--guidance_rescale 2.0: it must be 0 to 1" in capsys.readouterr().err
    assert not drawn
