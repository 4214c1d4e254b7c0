"""The card that ships with a LoRA: what it is, what it was seen to do, and how to make it again.

It is a README.md in the form that model hubs read (a YAML header, then Markdown). It shows counts,
rates and hashes; never a prompt, as those of harm are harm themselves.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from safetydpo_jax import storage
from safetydpo_jax.evaluate.summary import table

# Keys of the config that make the recipe; the rest is about folders, logs and the report.
RECIPE = (
    "recipe",
    "rows",
    "steps",
    "batch_size",
    "accumulation",
    "preserve_batch_size",
    "seed",
    "dtype",
    "matmul_precision",
    "mix",
    "loss",
    "optimizer",
    "lora",
)


def write_model_card(
    path: pathlib.Path,
    config: ConfigDict,
    *,
    files: Sequence[pathlib.Path],
    adapters: str,
    pairs: Mapping[str, Any],
    model_hash: str,
    exported: str,
    summary: Mapping[str, Any],
    command: str,
    version: str,
) -> None:
    """Writes the card of the LoRA that lies beside it.

    Args:
      path: the card, `export/README.md`.
      config: from `settings.resolve`.
      files: the LoRA in diffusers' format, then in kohya's, in the card's folder or below.
      adapters: their ranks and layers, in words.
      pairs: card.json of the pair set.
      model_hash: of the base model's UNet and noise schedule.
      exported: which step it is of, and why.
      summary: the report's; empty if nothing was measured.
      command: that made it; empty if it was made from Python.
      version: of this package.
    """
    name = config.category.replace("_", " ")
    if name == "all":
        name = "any of the seven harm categories"
    loras = {f.relative_to(path.parent).as_posix(): storage.hash_file(f) for f in files}
    base = base_name(config)
    sections = {
        "What it is": (
            f"A LoRA of {adapters} of the UNet of `{base}`, trained for the model to draw a safe "
            f"counterpart where it is asked for *{name}*. The method is SafetyDPO "
            "(AlignGuard, [arXiv 2412.10493](https://arxiv.org/abs/2412.10493)): Diffusion-DPO on "
            "pairs of a safe and an unsafe picture. Made with safetydpo_jax "
            f"{version}."
        ),
        "How to use it": _usage(config, list(loras)),
        "Intended use and limits": _limits(name, summary),
        "What it was seen to do": f"{exported[0].upper()}{exported[1:]}.\n\n"
        + _results(config, summary),
        "Base": f"`{base}`, UNet and noise schedule sha256 `{model_hash}`.",
        "Data": _data(config, pairs),
        "Recipe": _recipe(config),
        "Made by": (
            f"```bash\n{command}\n```"
            if command
            else "`safetydpo_jax.train.loop.run`, from Python."
        )
        + "\n\nThe whole config is in `config.json` in the run's folder.",
        "Files": "\n".join(f"- `{file}`, sha256 `{digest}`" for file, digest in loras.items()),
        "Licence": (
            f"That of the base model ({config.license}), whose use restrictions hold for what is "
            "derived from it. Check it against your own copy of the base."
            + (f" That of {_init(config)}, holds too." if config.lora.init else "")
        ),
    }
    header = {
        "license": config.license,
        **({"base_model": config.model} if _is_on_the_hub(config) else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "safety", "diffusion-dpo", "safetydpo"],
    }
    # JSON is YAML, and quotes what needs it.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", ""]
    lines.append(f"# Safety LoRA against {name}\n")
    lines += [f"## {title}\n\n{text}\n" for title, text in sections.items()]
    storage.write_file(path, "\n".join(lines).encode())


def base_name(config: ConfigDict) -> str:
    """The base as it may be told to others: of a folder or an address the last part."""
    return config.model if _is_on_the_hub(config) else pathlib.Path(config.model).name


def _is_on_the_hub(config: ConfigDict) -> bool:
    place = pathlib.Path(config.model)
    elsewhere = place.is_absolute() or place.exists() or "://" in config.model
    return config.model != "emoji" and not elsewhere


def _usage(config: ConfigDict, files: Sequence[str]) -> str:
    diffusers_file, kohya_file = files
    kind = "StableDiffusionXLPipeline" if config.base == "sdxl" else "StableDiffusionPipeline"
    base, load = base_name(config), "from_pretrained"
    model = f'"{base}"' if _is_on_the_hub(config) else f'"PATH/TO/{base}"'
    if base.endswith(".safetensors"):
        load = "from_single_file"
    imports = "import diffusers\nimport torch\n"
    if base == "emoji":
        imports = "import pathlib\n\nimport diffusers\nimport torch\n\nimport safetydpo_jax\n"
        model = 'pathlib.Path(safetydpo_jax.__file__).parent / "emoji" / "pipeline"'
    text = (
        "In diffusers (PyTorch), with this folder as `FOLDER`:\n\n```python\n"
        f"{imports}\n"
        f"pipe = diffusers.{kind}.{load}({model})\n"
        # transformers keeps a file's half precision. (`dtype=` has two names, by the version.)
        "pipe.to(torch.float32)\n"
        f'pipe.load_lora_weights("FOLDER", weight_name="{diffusers_file}")\n'
        "```\n\n"
        f"In ComfyUI: copy `{kohya_file}` to `ComfyUI/models/loras` and put a "
        "`LoraLoaderModelOnly` node with strength 1 between checkpoint and sampler. In A1111 the "
        "same file goes to `models/Lora`, and it acts only with "
        f"`<lora:{pathlib.PurePath(kohya_file).stem}:1>` in the prompt."
    )
    if config.base == "emoji":
        text += " (The embedded model is too small for either; this is for Stable Diffusion.)"
    return text


def _limits(name: str, summary: Mapping[str, Any]) -> str:
    text = (
        f"It is meant to make a model safer that may be asked for {name}, as one layer of several: "
        "keep a filter on prompts and on pictures. It is no guarantee: prompts that were made to "
        "get around it, other languages and concepts unlike those trained on may still bring the "
        "harm back, and whoever has the base model can leave the LoRA out. It must not be used to "
        "find or make harmful pictures, as by applying it with a negative strength."
    )
    if summary.get("num_held_out_concepts"):
        before, after = (
            100 * summary[f"held_out_concepts_ip_{when}"] for when in ("before", "after")
        )
        text += (
            f" Of unsafe concepts of this category that were in no pair, {before:.0f} % of the "
            f"pictures were unsafe before and {after:.0f} % after."
        )
    return text


def _results(config: ConfigDict, summary: Mapping[str, Any]) -> str:
    if not summary:
        evaluated = config.health.every and config.base == "emoji"  # which alone has a judge
        return (
            f"Nothing {'else ' if evaluated else ''}was measured. Measure it on prompts of your own"
            " before you rely on it."
        )
    text = (
        f"On prompts that training never saw (split {config.report.split}"
        + (", as of those that chose the exported step" if config.report.split == "tune" else "")
        + "), before and after from the same noise, 95 % intervals over prompts, one training "
        "seed:\n\n"
        f"```\n{table(summary)}\n```"
    )
    return text


def _data(config: ConfigDict, pairs: Mapping[str, Any]) -> str:
    settings = pairs.get("settings", {})
    drawn_by = pathlib.PurePath(pairs.get("model", "unknown")).name
    unused = "" if config.loss.preservation else ", not used,"
    return (
        f"{pairs['num_pairs']} pairs of a safe and an unsafe picture and {pairs['num_preserve']} "
        f"other safe pictures{unused} (content sha256 `{pairs['content_hash']}`), source: "
        f"{settings.get('source', 'unknown')}; drawn by: {drawn_by}. Learnt "
        f"with rows `{config.rows}`."
    )


def _recipe(config: ConfigDict) -> str:
    rows = ["| setting | value |", "|---|---|"]
    for key in RECIPE:
        value = config[key]
        items = value.items() if isinstance(value, ConfigDict) else [("", value)]
        if key == "mix" and not value:  # as it is for one set of pairs
            continue
        if key == "lora":
            # What training began with has layers and ranks of its own.
            unused = ("rank", "targets") if config.lora.init else ("init",)
            items = [(k, _init(config) if k == "init" else v) for k, v in items if k not in unused]
        rows += [f"| {'.'.join(filter(None, (key, k)))} | {v} |" for k, v in items]
    return "\n".join(rows)


def _init(config: ConfigDict) -> str:
    """The LoRA that training went on from, without its place on this machine."""
    file = pathlib.Path(config.lora.init)
    return f"the LoRA `{file.name}` that it goes on from (sha256 `{storage.hash_file(file)}`)"
