"""The names of Stable Diffusion's original code, for layers that we call as diffusers does.

Files from elsewhere hold them: kohya's LoRAs for SDXL, and checkpoints in a single file.
Source of the names: CompVis/latent-diffusion, `openaimodel.py` and `model.py`, and open_clip,
`transformer.py`; the rules are the same for Stable Diffusion 1.x, 2.x and XL.
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


_VAE_FIXED = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
}
_VAE_INSIDE = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_VAE_BLOCK = re.compile(
    r"(?P<way>down|up)_blocks\.(?P<i>\d+)\.(?:resnets\.(?P<j>\d+)|(?:down|up)samplers\.0)"
)


def original_vae_names(layers: Iterable[str]) -> dict[str, str]:
    """The original name of every layer of an autoencoder; arguments as of `original_unet_names`.

    There the levels of the decoder, too, are counted from the finest to the coarsest.
    """
    layers = list(layers)
    blocks = [match for layer in layers if (match := _VAE_BLOCK.search(layer))]
    last = max(int(b["i"]) for b in blocks)

    def original(layer: str) -> str:
        side, _, rest = layer.partition(".")
        if side not in ("encoder", "decoder"):
            return layer  # quant_conv and post_quant_conv
        if match := _VAE_BLOCK.match(rest):
            down, i = match["way"] == "down", int(match["i"])
            level = f"{match['way']}.{i if down else last - i}"
            inside = rest[match.end() + 1 :]
            if match["j"] is None:
                return f"{side}.{level}.{'downsample' if down else 'upsample'}.{inside}"
            return f"{side}.{level}.block.{match['j']}.{_VAE_INSIDE.get(inside, inside)}"
        for name, other in _VAE_FIXED.items():
            if rest == name or rest.startswith(f"{name}."):
                inside = rest[len(name) + 1 :]
                inside = _VAE_INSIDE.get(inside, inside)
                return f"{side}.{other}.{inside}".rstrip(".")
        return layer  # conv_in and conv_out

    return {layer: original(layer) for layer in layers}


_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.(?P<i>\d+)\.(?P<inside>.+)")


def open_clip_name(key: str) -> tuple[str, int | None]:
    """Where open_clip keeps a parameter of a text encoder, given its state-dict key.

    Returns:
      Its key there, and which third of that tensor it is, as there queries, keys and values lie in
      one; None is all of it.
    """
    if key == "text_projection.weight":
        return "text_projection", None  # a bare (d, p) matrix: transposed
    if key.startswith("text_model.embeddings.token_embedding"):
        return "token_embedding.weight", None
    if key.startswith("text_model.embeddings.position_embedding"):
        return "positional_embedding", None
    if key.startswith("text_model.final_layer_norm."):
        return f"ln_final.{key.rpartition('.')[2]}", None
    match = _OPEN_CLIP_LAYER.fullmatch(key)
    if not match:
        raise ValueError(f"{key} is no parameter of a CLIP text encoder")
    layer, kind = match["inside"].rpartition(".")[::2]
    block = f"transformer.resblocks.{match['i']}"
    if layer in _OPEN_CLIP:
        return f"{block}.{_OPEN_CLIP[layer]}.{kind}", None
    which = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(layer)
    return f"{block}.attn.in_proj_{kind}", which
