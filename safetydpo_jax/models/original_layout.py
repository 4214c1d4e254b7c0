"""The names of Stable Diffusion's original code, for layers that we call as diffusers does.

Files from elsewhere hold them: kohya's LoRAs for SDXL, and checkpoints in a single file.
Source of the names: CompVis/latent-diffusion, `openaimodel.py`; the rule is the same for Stable
Diffusion 1.x, 2.x and XL.
"""

import re
from collections.abc import Iterable

_FIXED = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(
    r"(?P<way>down|up)_blocks\.(?P<i>\d+)\.(?P<kind>resnets|attentions)\.(?P<j>\d+)"
)
_RESIZE = re.compile(r"(?P<way>down|up)_blocks\.(?P<i>\d+)\.(?:down|up)samplers\.0\.conv")


def original_unet_names(layers: Iterable[str]) -> dict[str, str]:
    """The original name of every layer of a UNet.

    There the way down and the way up are one list each, with a residual block, an attention and a
    change of size as the parts 0, 1 and 2 of an entry, as far as it has them.

    Args:
      layers: the dotted paths of all of its layers, diffusers' names.

    Returns:
      The same paths, each with its original name.
    """
    layers = list(layers)
    blocks = [match for layer in layers if (match := _BLOCK.match(layer))]
    depth = 1 + max(int(b["j"]) for b in blocks if (b["way"], b["i"]) == ("down", "0"))
    attends = {b["i"] for b in blocks if (b["way"], b["kind"]) == ("up", "attentions")}

    def original(layer: str) -> str:
        if match := _BLOCK.match(layer):
            # Down: conv_in comes first, and every block ends in a downsampler. Up: one layer more.
            entry = int(match["i"]) * (depth + 1) + int(match["j"])
            down = match["way"] == "down"
            block = f"input_blocks.{entry + 1}" if down else f"output_blocks.{entry}"
            part = 0 if match["kind"] == "resnets" else 1
            return f"{block}.{part}{_inside(layer[match.end() :])}"
        if match := _RESIZE.match(layer):
            i = int(match["i"])
            if match["way"] == "down":
                return f"input_blocks.{(i + 1) * (depth + 1)}.0.op"
            part = 2 if match["i"] in attends else 1
            return f"output_blocks.{i * (depth + 1) + depth}.{part}.conv"
        for name, other in _FIXED.items():
            if layer == name or layer.startswith(f"{name}."):
                return other + _inside(layer[len(name) :])
        raise ValueError(f"{layer} is no layer of a Stable Diffusion UNet")

    return {layer: original(layer) for layer in layers}


def _inside(rest: str) -> str:
    """A name within a block: of a residual block another one, of an attention the same."""
    return "." + _RESNET.get(rest[1:], rest[1:]) if rest else ""
