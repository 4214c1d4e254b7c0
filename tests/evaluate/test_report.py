import json

import ml_collections
import numpy as np
import pytest
from PIL import Image

from safetydpo_jax.emoji.concepts import CATEGORY_OF, HARMS
from safetydpo_jax.errors import UserError
from safetydpo_jax.evaluate import detect, evaluate, summarise, table, write_report
from safetydpo_jax.evaluate.detections import EmojiJudge, fingerprint
from safetydpo_jax.evaluate.report import picture_seeds, report_prompts
from safetydpo_jax.evaluate.summary import hidden
from safetydpo_jax.harm import Harm, HarmPair
from tests.evaluate import fakes


def config(**changes):
    settings = {
        "category": "hate",
        "harm": "",
        "report": {"num_unsafe": 24, "num_safe": 20, "seed": 0, "split": "test", "reveal": False},
        "drawing": {
            "sampler": "ddim", "num_steps": 2, "guidance_scale": 4.0,
            "batch_size": 16, "matmul_precision": None,
        },
    }  # fmt: skip
    config = ml_collections.ConfigDict(settings)
    config.update_from_flattened_dict(changes)
    return config


def write(workdir, draw=None, adapters=None, lines=None, **changes):
    return write_report(
        config(**changes), fakes.pipeline(), adapters, workdir,
        judge=fakes.Judge(), draw=draw or fakes.Drawer(),
        progress=(lines if lines is not None else []).append,
    )  # fmt: skip


def test_report_of_an_expert(tmp_path):
    lines = []
    summary = write(tmp_path, adapters=fakes.adapters(), lines=lines)
    on_disk = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert on_disk == summary
    assert summary["ip_before"] == 1.0
    assert summary["fidelity_before"] == summary["fidelity_after"] == 1.0
    assert summary["junk_before"] == summary["junk_after"] == 0.0
    assert 0.05 < summary["ip_after"] < 0.5  # about one seed in four
    assert summary["ip_after"] + summary["counterpart_after"] == pytest.approx(1, abs=1e-5)
    assert summary["ip_fall"] == pytest.approx(1 - summary["ip_after"], abs=1e-5)
    low, high = summary["ip_after_interval"]
    assert low < summary["ip_after"] < high
    assert summary["companion_survival"] == 1.0
    sizes = {k: v for k, v in summary.items() if k.startswith("num_")}
    assert sizes == {
        "num_unsafe": 24, "num_held_out_concepts": 6, "num_safe": 20, "num_counterparts": 6
    }  # fmt: skip
    assert summary["settings"]["num_steps"] == 2
    assert set(summary["seconds"]) == {"before", "after", "total"}
    with Image.open(tmp_path / "report" / "grid.png") as grid:
        assert grid.width > 1000
    assert "unsafe concept (IP)" in lines[-1]
    assert "24/24 pictures" in "".join(lines)


def test_unsafe_pictures_are_blurred_unless_asked_for(tmp_path):
    def grid():
        with Image.open(tmp_path / "report" / "grid.png") as image:
            return np.asarray(image.convert("RGB"), int)

    write(tmp_path, adapters=fakes.adapters())
    blurred = grid()
    write(tmp_path, adapters=fakes.adapters())
    np.testing.assert_array_equal(grid(), blurred)
    write(tmp_path, adapters=fakes.adapters(), **{"report.reveal": True})
    assert np.abs(grid() - blurred).max() > 32


@pytest.mark.parametrize(
    ("name", "is_base", "wanted"),
    [
        ("unsafe", True, [True, True]),  # whatever the judge makes of what was asked for
        ("held_out_concepts", True, [True, True]),
        ("unsafe", False, [True, False]),
        ("safe", True, [True, False]),
        ("safe", False, [True, False]),
    ],
)
def test_which_pictures_are_hidden(name, is_base, wanted):
    assert hidden(name, ["unsafe", "counterpart"], is_base=is_base).tolist() == wanted


def test_erasing_counts_as_junk(tmp_path):
    class Eraser(fakes.Drawer):
        def __call__(self, pipeline, prompts, seeds, *, adapters, **settings):
            pictures = super().__call__(pipeline, prompts, seeds, adapters=None, **settings)
            if adapters is not None:
                unsafe = [any(name in text for name in fakes.SAFE_FOR) for text in prompts]
                pictures[np.array(unsafe), 0, 0] = fakes.BLANK
            return pictures

    summary = write(tmp_path, adapters=fakes.adapters(), draw=Eraser())
    assert summary["ip_after"] == summary["unsafe_junk_before"] == 0.0
    assert summary["unsafe_junk_after"] == summary["unsafe_junk_change"] == 1.0


def test_prompts_are_never_told(tmp_path):
    lines = []
    write(tmp_path, adapters=fakes.adapters(), lines=lines)
    files = [p for p in tmp_path.rglob("*") if p.suffix == ".json" and p.name != "summary.json"]
    assert files
    files.append(tmp_path / "report" / "summary.json")
    said = "\n".join([*lines, *(file.read_text() for file in files)])
    for records in report_prompts(HARMS["hate"], 24, 20, seed=0).values():
        for record in records:
            assert record.text not in said


def test_without_adapters_nothing_changes(tmp_path):
    draw = fakes.Drawer()
    summary = write(tmp_path, draw=draw)
    assert draw.batches == 6  # of 16 at most: the second time they are on disk
    assert summary["ip_fall"] == 0
    assert summary["fidelity_change"] == 0


def test_goes_on_where_it_broke_off(tmp_path):
    whole = write(tmp_path / "whole", adapters=fakes.adapters())
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "broken", draw=fakes.Drawer(break_after=5), adapters=fakes.adapters())
    assert not (tmp_path / "broken" / "report" / "summary.json").exists()
    draw = fakes.Drawer()
    resumed = write(tmp_path / "broken", draw=draw, adapters=fakes.adapters())
    assert draw.batches == 12 - 5
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    grids = [(tmp_path / name / "report" / "grid.png").read_bytes() for name in ("whole", "broken")]
    assert grids[0] == grids[1]


def test_base_pictures_are_drawn_once_for_many_experts(tmp_path):
    for strength, batches in ((1.0, 12), (2.0, 6), (1.0, 0)):
        draw = fakes.Drawer()
        evaluate(
            config(), fakes.pipeline(), fakes.adapters(strength), tmp_path,
            judge=fakes.Judge(), draw=draw, progress=lambda line: None,
        )  # fmt: skip
        assert draw.batches == batches


@pytest.mark.parametrize(
    "change",
    [
        {"report.seed": 1},
        {"drawing.num_steps": 3},
        {"drawing.guidance_scale": 1.0},
        {"report.num_unsafe": 25},
    ],
)
def test_other_settings_share_nothing(tmp_path, change):
    write(tmp_path)
    draw = fakes.Drawer()
    write(tmp_path, draw=draw, **change)
    # Only another number of unsafe prompts leaves the other sets as they were.
    assert draw.batches == (2 if "report.num_unsafe" in change else 6)


def test_fingerprint_sees_every_number():
    assert fingerprint(fakes.pipeline(1.0).unet_params) == fingerprint({"conv": {
        "kernel": np.ones((2, 2), np.float32)}})  # fmt: skip
    trees = [{"a": np.zeros(3)}, {"b": np.zeros(3)}, {"a": np.zeros((3, 1))},
             {"a": np.zeros(3, np.float32)}, {"a": np.array([0, 0, 1e-9])}]  # fmt: skip
    assert len({fingerprint(tree) for tree in trees}) == len(trees)


def test_evaluations_are_pooled(tmp_path):
    evaluations = [
        evaluate(
            config(**{"report.seed": seed}), fakes.pipeline(), fakes.adapters(), tmp_path,
            judge=fakes.Judge(), draw=fakes.Drawer(), progress=lambda line: None,
        )[0]
        for seed in (0, 1, 2)
    ]  # fmt: skip
    pooled, single = summarise(evaluations), [summarise([e]) for e in evaluations]
    assert pooled["num_unsafe"] == 72
    assert pooled["ip_after"] == pytest.approx(np.mean([s["ip_after"] for s in single]), abs=1e-5)
    widths = [np.ptp(s["ip_after_interval"]) for s in (pooled, single[0])]
    assert widths[0] < widths[1]
    assert "fall" in table(pooled)


def test_undefined_rates_are_null(tmp_path):
    class Blind(fakes.Judge):
        name = "blind"

        def __call__(self, pictures):
            return [frozenset()] * len(pictures)

    summary = write_report(
        config(), fakes.pipeline(), None, tmp_path,
        judge=Blind(), draw=fakes.Drawer(), progress=lambda line: None,
    )  # fmt: skip
    assert summary["ip_fall"] is None
    assert summary["junk_before"] == 1.0
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["ip_fall"] is None


def test_noise_is_its_own_for_every_set_and_picture():
    prompts = report_prompts(HARMS["hate"], 24, 20, seed=0)
    seeds = np.concatenate(list(picture_seeds(prompts, 0).values()))
    assert seeds.dtype == np.uint32
    assert len(set(seeds.tolist())) == len(seeds) == 56
    assert not set(seeds) & set(np.concatenate(list(picture_seeds(prompts, 1).values())))


def test_a_harm_without_held_out_concepts(tmp_path):
    harm = tmp_path / "harm.yaml"
    harm.write_text("name: gaming\nconcepts:\n- {unsafe: dice, safe: cat}\n")
    lines = []
    summary = write(
        tmp_path, adapters=fakes.adapters(), lines=lines, harm=str(harm), category="gaming"
    )
    assert {k: v for k, v in summary.items() if k.startswith("num_")} == {
        "num_unsafe": 24, "num_safe": 20, "num_counterparts": 6
    }  # fmt: skip
    assert "held_out_concepts_ip_before" not in summary
    assert summary["category"] == "gaming"
    assert "never trained on" not in lines[-1]
    assert (tmp_path / "report" / "grid.png").exists()


def test_concepts_of_the_harm_are_in_no_safe_prompt():
    harm = Harm("gaming", (HarmPair("dice", "cat"), HarmPair("frog", "gift", held_out=True)))
    sets = report_prompts(harm, 24, 300, seed=0)
    assert {r.target for r in sets["held_out_concepts"]} == {"frog"}
    assert not {name for r in sets["safe"] for name in r.concepts} & harm.names
    assert EmojiJudge(harm.unsafe_names).unsafe_names == {*CATEGORY_OF, "frog"}


def test_settings_are_chosen_on_other_prompts():
    test, tune = (report_prompts(HARMS["hate"], 24, 20, 0, split) for split in ("test", "tune"))
    for name in ("unsafe", "safe", "counterparts"):
        assert not {r.text for r in test[name]} & {r.text for r in tune[name]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report.num_unsafe": 0}, "report.num_unsafe is 0"),
        ({"report.num_safe": 0}, "the numbers must be 1 or more"),
        ({"report.seed": -1}, "the seed 0 or more"),
        ({"report.split": "train"}, "report.split is 'train': it must be one of test, tune"),
        ({"drawing.batch_size": 0}, "batch_size 0"),
        ({"category": "hatred"}, "config.category is 'hatred': it must be one of hate, "),
    ],
)
def test_wrong_settings(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path, **changes)


def test_diverged_adapters_are_named(tmp_path):
    with pytest.raises(UserError, match="hold NaN or infinity, so training has diverged"):
        write(tmp_path, adapters=fakes.adapters(float("nan")))


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (np.full((2, 8, 8, 3), np.nan), "must be uint8"),
        (np.zeros((2, 8, 8), np.uint8), "must be uint8"),
        (np.zeros((1, 8, 8, 3), np.uint8), "1 pictures came back for 2"),
    ],
)
def test_what_is_no_picture(tmp_path, pictures, message):
    with pytest.raises(UserError, match=message):
        detect(
            fakes.pipeline(), ["a", "b"], np.arange(2), fakes.Judge(), tmp_path,
            draw=lambda *args, **settings: pictures,
        )  # fmt: skip


def test_as_many_seeds_as_prompts(tmp_path):
    with pytest.raises(UserError, match="2 prompts, 1 seeds"):
        detect(fakes.pipeline(), ["a", "b"], np.arange(1), fakes.Judge(), tmp_path)
