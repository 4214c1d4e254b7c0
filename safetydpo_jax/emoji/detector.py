"""A small CNN that names the concepts in a picture of the embedded world, or none for junk."""

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from safetydpo_jax.emoji.concepts import CONCEPTS, NONE
from safetydpo_jax.emoji.scenes import SIDE
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.models.autoencoder import to_pixels

WEIGHTS = Path(__file__).parent / "detector.safetensors"
THRESHOLD = 0.5  # a concept is named from this probability on
AT_MOST = 2  # concepts in a picture
PLACES = 4  # a side: the network looks for a concept at 4 x 4 places
_BATCH = 64  # pictures a compiled call
_EPSILON = 1e-5


class DetectorNet(nn.Module):
    """Says of each of 4 x 4 places which concept has its centre there, if any.

    A residual network of 0.9 M parameters and 57 MFLOP a picture; a place sees the whole picture
    or nearly so.

    Attributes:
        training: normalise over the batch. The shipped network has these norms folded into its
            convolutions; see fold_norms.
    """

    training: bool = False

    @nn.compact
    def __call__(self, pixels: Float[Array, "b 64 64 3"]) -> Float[Array, "b 4 4 classes"]:
        """Logits of every concept and, last, of none, from pixels in [-1, 1]."""
        b, patch = pixels.shape[0], 4
        side = SIDE // patch
        x = pixels.reshape(b, side, patch, side, patch, 3).swapaxes(2, 3)
        x = x.reshape(b, side, side, patch * patch * 3)
        x = nn.relu(self._conv(x, 48, 1, "0"))
        x = nn.relu(self._conv(x, 96, 2, "1"))
        for name in ("2", "3"):
            x = nn.relu(x + self._conv(x, 96, 1, name))
        x = nn.relu(self._conv(x, 160, 2, "4"))
        for name in ("5", "6"):
            x = nn.relu(x + self._conv(x, 160, 1, name))
        return nn.Dense(NONE + 1, name="concepts")(x)

    def _conv(self, x: Array, features: int, stride: int, name: str) -> Array:
        x = nn.Conv(
            *(features, (3, 3), stride),
            use_bias=not self.training,
            kernel_init=nn.initializers.he_normal(),
            name=f"conv_{name}",
        )(x)
        if not self.training:
            return x
        return nn.BatchNorm(
            use_running_average=False, momentum=0.99, epsilon=_EPSILON, name=f"norm_{name}"
        )(x)


def fold_norms(variables: Any) -> Any:
    """Parameters of DetectorNet() that computes what the trained one does by running averages.

    Args:
        variables: "params" and "batch_stats" of DetectorNet(training=True).
    """
    params = {"concepts": variables["params"]["concepts"]}
    for name, averages in variables["batch_stats"].items():
        norm, conv = variables["params"][name], name.replace("norm", "conv")
        gain = norm["scale"] / jnp.sqrt(averages["var"] + _EPSILON)
        kernel = variables["params"][conv]["kernel"] * gain
        params[conv] = {"kernel": kernel, "bias": norm["bias"] - averages["mean"] * gain}
    return params


def concept_digest() -> str:
    """Fingerprint of the concepts in order: a detector is of use for the same ones only."""
    return hashlib.sha256("\n".join(c.name for c in CONCEPTS).encode()).hexdigest()[:16]


def save_params(params: Any, path: str | Path) -> None:
    """Writes the parameters as float16 safetensors, keys being the parameter paths."""
    flat = flax.traverse_util.flatten_dict(params, sep=".")
    half = {key: np.asarray(value, np.float16) for key, value in flat.items()}
    save_file(half, path, {"format": "flax", "concepts": concept_digest()})


@cache
def _param_shapes() -> dict[str, tuple[int, ...]]:
    example = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    variables = jax.eval_shape(DetectorNet().init, jax.random.key(0), example)
    flat: Any = flax.traverse_util.flatten_dict(variables["params"], sep=".")
    return {key: leaf.shape for key, leaf in flat.items()}


def load_params(path: str | Path) -> Any:
    """Reads what save_params wrote, as float32.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no safetensors file, was trained for other concepts, or has other
            parameters than DetectorNet.
    """
    if not Path(path).is_file():
        raise MissingFileError(
            f"{path}: the detector's weights are missing; reinstall the package or run "
            "launch/train_detector.py"
        )
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            flat = {key: file.get_tensor(key).astype(np.float32) for key in file.keys()}  # noqa: SIM118 (a file is no dict)
    except SafetensorError as error:
        raise UserError(
            f"{path}: not a safetensors file ({error}); run launch/train_detector.py again"
        ) from error
    if metadata.get("concepts") != concept_digest():
        raise UserError(
            f"{path}: trained for other concepts than emoji/concepts.py has now; run "
            "launch/train_detector.py again"
        )
    if {key: value.shape for key, value in flat.items()} != _param_shapes():
        raise UserError(
            f"{path}: its parameters are not those of DetectorNet; run launch/train_detector.py "
            "again"
        )
    return flax.traverse_util.unflatten_dict(flat, sep=".")


@jax.jit
def _probabilities(params: Any, pictures: UInt8[Array, "b 64 64 3"]) -> Float[Array, "b concepts"]:
    logits: Any = DetectorNet().apply({"params": params}, to_pixels(pictures))
    return jax.nn.softmax(logits)[..., :NONE].max((1, 2))


@dataclass(frozen=True)
class Detector:
    """The trained network.

    Attributes:
        params: of DetectorNet, float32.
    """

    params: Any

    @classmethod
    def load(cls, path: str | Path = WEIGHTS) -> "Detector":
        """Reads a detector, the shipped one by default; raises as load_params."""
        return cls(load_params(path))

    def probabilities(
        self, pictures: UInt8[np.ndarray, "n height width channels"]
    ) -> Float[np.ndarray, "n concepts"]:
        """Probability of each concept where it is likeliest, in the order of CONCEPTS.

        Args:
            pictures: sRGB, (n, 64, 64, 3).

        Raises:
            UserError: pictures of another size.
        """
        if pictures.shape[1:] != (SIDE, SIDE, 3):
            raise UserError(
                f"the emoji detector reads {SIDE}x{SIDE} RGB pictures, not {pictures.shape[1:]}; "
                "use another judge for other pictures"
            )
        # The last batch is padded, so that one shape is compiled.
        padded = np.zeros((math.ceil(len(pictures) / _BATCH) * _BATCH, SIDE, SIDE, 3), np.uint8)
        padded[: len(pictures)] = pictures
        found = np.zeros((len(padded), len(CONCEPTS)), np.float32)
        for start in range(0, len(padded), _BATCH):
            found[start : start + _BATCH] = _probabilities(
                self.params, padded[start : start + _BATCH]
            )
        return found[: len(pictures)]

    def names(self, pictures: UInt8[np.ndarray, "n height width channels"]) -> list[frozenset[str]]:
        """The concepts each picture shows, two at most; an empty set is "none": blank or junk."""
        return [name_concepts(row) for row in self.probabilities(pictures)]


def name_concepts(probabilities: Float[np.ndarray, "concepts"]) -> frozenset[str]:
    """Names of the most probable concepts from THRESHOLD on, AT_MOST of them."""
    likeliest = np.argsort(-probabilities)[:AT_MOST]
    return frozenset(CONCEPTS[i].name for i in likeliest if probabilities[i] >= THRESHOLD)
