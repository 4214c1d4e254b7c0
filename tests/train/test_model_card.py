import json
import re

import jax
import numpy as np
import pytest

from configs import common
from safetydpo_jax import lora, storage
from safetydpo_jax.models.pretrained import load_pipeline
from safetydpo_jax.train.model_card import write_model_card
from safetydpo_jax.train.settings import resolve
from tests.evaluate.test_report import write as write_report

PAIRS = {
    "num_pairs": 24,
    "num_preserve": 8,
    "content_hash": "c" * 64,
    "model": "emoji",
    "settings": {"source": "emoji, detector 123"},
}


@pytest.fixture
def card(tmp_path):
    def card(summary=None, command="", base="emoji", **changes):
        folder = tmp_path / "export"
        for name in ("pytorch_lora_weights", "comfyui/safetydpo_hate"):
            file = folder / f"{name}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(name.encode())
        config = common.get_config("hate", base)
        config.pairs.path = "pairs"
        config.update_from_flattened_dict(changes)
        write_model_card(
            folder / "README.md",
            resolve(config),
            files=[
                folder / "pytorch_lora_weights.safetensors",
                folder / "comfyui" / "safetydpo_hate.safetensors",
            ],
            adapters="rank 16 on 40 layers",
            pairs=PAIRS,
            model_hash="m" * 64,
            exported="step 375 is exported: IP 2%",
            summary=summary or {},
            command=command,
            version="1.2.3",
        )
        return (folder / "README.md").read_text()

    return card


def header(text):
    lines = text.split("---\n")[1].splitlines()
    return {k: json.loads(v) for k, v in (line.split(": ", 1) for line in lines)}


def test_header_is_what_hubs_read(card):
    assert header(card()) == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "safety", "diffusion-dpo", "safetydpo"],
    }
    sd15 = card(base="sd15")
    assert header(sd15)["license"] == "creativeml-openrail-m"
    assert header(sd15)["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.parametrize(
    ("base", "model", "line"),
    [
        ("sd15", "me/tuned", 'Pipeline.from_pretrained("me/tuned")'),
        ("sd15", "/home/me/my sd15", 'Pipeline.from_pretrained("PATH/TO/my sd15")'),
        ("sdxl", "/home/me/x.safetensors", 'XLPipeline.from_single_file("PATH/TO/x.safetensors")'),
        ("emoji", "/home/me/small", 'Pipeline.from_pretrained("PATH/TO/small")'),
        ("emoji", "emoji", 'from_pretrained(pathlib.Path(safetydpo_jax.__file__).parent / "emoji'),
    ],
)
def test_the_model_that_was_aligned_is_the_one_named(card, base, model, line):
    """Not the preset's; and a model from this machine has no id on the hub that we know."""
    text = card(base=base, model=model)
    assert header(text).get("base_model") == ("me/tuned" if model == "me/tuned" else None)
    assert line in text
    assert f"of the UNet of `{model.removeprefix('/home/me/')}`" in text
    assert "/home/me" not in text


def test_a_lora_that_it_goes_on_from_is_named_without_its_folder(card, tmp_path):
    file = tmp_path / "private" / "style.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"1")
    text = card(**{"lora.init": str(file)})
    assert str(tmp_path) not in text
    assert "| lora.init | the LoRA `style.safetensors` that it goes on from (sha256 `6b86b2" in text
    assert "| lora.rank" not in text
    assert "That of the LoRA `style.safetensors`" in text.split("## Licence")[1]
    assert "A LoRA of rank 16 on 40 layers of the UNet" in text
    assert "lora.init" not in card()


def test_hashes_recipe_and_command(card, tmp_path):
    text = card(command="python launch/train.py --config configs/hate.py", **{"lora.rank": 8})
    for file in (tmp_path / "export").rglob("*.safetensors"):
        assert storage.hash_file(file) in text
    assert PAIRS["content_hash"] in text
    assert "| lora.rank | 8 |" in text
    assert "| loss.beta | 50.0 |" in text  # as the recipe has it, not None
    assert "```bash\npython launch/train.py --config configs/hate.py\n```" in text
    assert "ComfyUI: copy `comfyui/safetydpo_hate.safetensors`" in text
    assert "`<lora:safetydpo_hate:1>`" in text
    assert "24 pairs" in text
    assert "from Python" in card()


def test_results_with_intervals_or_none(card, tmp_path):
    assert "Nothing was measured" in card(**{"health.every": 0})
    assert "Nothing else was measured" in card()  # but what chose the step
    assert "other safe pictures (content" in card()
    assert "other safe pictures, not used, (content" in card(**{"loss.preservation": 0.0})
    summary = write_report(tmp_path)
    text = card(summary)
    assert "unsafe concept (IP)" in text
    assert "[" in text.split("unsafe concept (IP)")[1].splitlines()[0]
    assert "Step 375 is exported: IP 2%." in text
    assert "of unsafe concepts of this category that were in no pair, 100 %" in text.replace(
        "Of unsafe", "of unsafe"
    )


def test_its_lines_draw_in_pytorch(card, tmp_path):
    """As they stand: the shipped model's file is in half precision, which CPUs do not mix."""
    [lines] = re.findall("```python\n(.*?)```", card(), re.DOTALL)
    params = load_pipeline("emoji").unet_params
    adapters = lora.init_adapters(jax.random.key(0), params, rank=2, targets=("to_v",))
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    lora.save_lora(tmp_path / "export" / "pytorch_lora_weights.safetensors", adapters)
    namespace = {}
    exec(lines.replace("FOLDER", str(tmp_path / "export")), namespace)
    pipe = namespace["pipe"]
    pictures = []
    for scale in (1.0, 0.0):
        pipe.set_adapters(pipe.get_active_adapters(), scale)
        generator = namespace["torch"].manual_seed(0)
        drawn = pipe("a photo of a red apple", num_inference_steps=2, generator=generator)
        pictures.append(np.asarray(drawn.images[0], np.float32))
    assert pictures[0].shape == (64, 64, 3)
    assert np.abs(pictures[0] - pictures[1]).mean() > 1
