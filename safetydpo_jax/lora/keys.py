"""Which layer a tensor of a LoRA file belongs to, in every spelling that is in use.

    unet.LAYER.lora_A.weight                      diffusers; peft has its own prefix
    unet.LAYER.lora.down.weight                   diffusers before peft, and SafetyDPO's own files
    ATTENTION.processor.to_q_lora.down.weight     diffusers before that
    lora_unet_LAYER.lora_down.weight              kohya, "_" for "."; LAYER may be an original name

A is "lora_A" or "down", B is "lora_B" or "up", and "LAYER.alpha" may stand beside them.
"""

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

from safetydpo_jax.errors import UserError
from safetydpo_jax.models.original_layout import original_unet_names

_WEIGHT = re.compile(
    r"(?P<layer>.+)\.(?P<side>lora_A|lora_B|lora\.down|lora\.up|lora_down|lora_up)"
    r"(?:\.default)?\.weight"
)
_PROCESSOR = re.compile(
    r"(?P<attention>.+)\.processor\.(?P<layer>to_q|to_k|to_v|to_out)_lora"
    r"\.(?P<side>down|up)\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
PEFT_PREFIX = "base_model.model."
BASE_HASH = "base_sha256"  # our entry of it: of the UNet and noise schedule trained on
PEFT_CONFIG = "adapter_config.json"  # beside peft's weights
HEADER = "lora_adapter_metadata"  # diffusers' entry of the header: ranks and alphas, JSON
_PREFIXES = (f"{PEFT_PREFIX}unet.", PEFT_PREFIX, "unet.")
_KOHYA_PREFIX = "lora_unet_"
_TEXT_ENCODER = re.compile(rf"({re.escape(PEFT_PREFIX)})?(text_encoder|text_model|lora_te)")
# Part of a key -> the adapter that it is of, where that is none of ours.
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon in Tucker form",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    ".diff": "whole differences of weights",
    "lora_embedding": "embeddings",
    "lora_bias": "LoRA with biases",
}


def is_of_text_encoder(key: str) -> bool:
    """Whether the tensor under `key` adapts a text encoder, as many published LoRAs do too."""
    return _TEXT_ENCODER.match(key) is not None


class OtherBaseError(UserError):
    """A LoRA does not fit the base that it is held against; it may fit another."""


class Part(NamedTuple):
    """What a tensor is: `what` is "a", "b" or "alpha", of the layer with that dotted path."""

    layer: str
    what: str


class KeyReader:
    """Reads keys for a UNet.

    Args:
      layers: the dotted paths of the layers that an adapter may be for.
    """

    def __init__(self, layers: Iterable[str]):
        self._layers = set(layers)

    @functools.cached_property
    def _flat(self) -> dict[str, str]:
        """Both of kohya's names for every layer -> its path."""
        names = {layer.replace(".", "_"): layer for layer in self._layers}
        for layer, original in original_unet_names(self._layers).items():
            names[original.replace(".", "_")] = layer
        return names

    def __call__(self, key: str) -> Part:
        """What the tensor under `key` is.

        Raises:
          UserError: it is of another kind of adapter, or for no such layer.
        """
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise UserError(f"the key {key!r} is of {kind}, which is not supported")
        if match := _WEIGHT.fullmatch(key):
            name, what = match["layer"], _leaf(match["side"])
        elif match := _PROCESSOR.fullmatch(key):
            layer = "to_out.0" if match["layer"] == "to_out" else match["layer"]
            name, what = f"{match['attention']}.{layer}", _leaf(match["side"])
        elif match := _ALPHA.fullmatch(key):
            name, what = match["layer"], "alpha"
        else:
            raise UserError(
                f"the key {key!r} is in no LoRA format that is read here: those of diffusers, peft "
                "and kohya are"
            )
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        if name.startswith(_KOHYA_PREFIX):
            name = self._flat.get(name.removeprefix(_KOHYA_PREFIX), name)
        if name not in self._layers:
            raise OtherBaseError(
                f"the key {key!r} names no layer of this UNet; is the file for another base model?"
            )
        return Part(name, what)


def _leaf(side: str) -> str:
    return "a" if side.endswith(("lora_A", "down")) else "b"
