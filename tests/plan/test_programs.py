"""What a planned step is given, against what training would give it; no compiler is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import save_file

from configs import hate
from safetydpo_jax import lora, sharding
from safetydpo_jax.errors import UserError
from safetydpo_jax.plan.programs import Planned
from safetydpo_jax.train.settings import resolve
from tests.diffusion.tiny_pipeline import write_tiny_pipeline
from tests.models.test_single_file import in_original_layout

LATENTS = (8, 8, 4)


def planned(model, base="sd15", mesh=(-1, 1, 1), experts=None, **changes):
    config = hate.get_config(base)
    config.model, config.pairs.path = str(model), "."
    config.batch_size, config.accumulation = 8, 1
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return Planned(resolve(config), config.model, sharding.make_mesh(*mesh), experts)


def shapes(tree):
    return jax.tree.map(lambda x: x.shape, tree)


def test_goes_on_from_a_lora(model_folder, tmp_path, pipeline):
    """Its layers and ranks count, not those of the config."""
    adapters = lora.init_adapters(
        jax.random.key(0), pipeline.unet_params, rank=3, targets=("attn2.to_k",)
    )
    file = lora.save_lora(tmp_path / "lora.safetensors", adapters)
    state, *_ = planned(model_folder, lora__init=str(file)).arguments()
    assert shapes(state.adapters) == shapes(adapters)
    assert {x.shape for x in jax.tree.leaves(state.opt_state)} >= {
        x.shape for x in jax.tree.leaves(adapters)
    }


def test_a_lora_of_another_base(model_folder, tmp_path):
    params = {"conv_in": {"kernel": np.zeros((3, 3, 4, 9))}}
    adapters = lora.init_adapters(jax.random.key(0), params, rank=2, targets=("conv_in",))
    file = lora.save_lora(tmp_path / "lora.safetensors", adapters)
    with pytest.raises(UserError, match="the file is for another base model"):
        planned(model_folder, lora__init=str(file)).arguments()


def test_accumulation_and_reference_tables(model_folder):
    """Rows of all turns; of what the base answers the arrays that `data.loader` has."""
    step = planned(
        model_folder,
        recipe="anchored",
        accumulation=3,
        preserve_batch_size=16,
        reference__draws=2,
        cache__dtype="float16",
    )
    *_, batch, _ = step.arguments()
    rows, preserved = 3 * 8, 3 * 16
    assert batch["winner"]["mean"].shape == (rows, *LATENTS)
    assert batch["preserve"]["mean"].shape == (preserved, *LATENTS)
    assert batch["preserve"]["mean"].dtype == jnp.float16
    assert shapes(batch["reference"]) == {
        "errors": (rows, 2),
        "wanted": (rows, 2, *LATENTS),
        "preserved": (preserved, *LATENTS),
    }
    assert batch["conditioning"].prompt_embeds.shape == (rows, 12, 16)
    assert step.flops() < planned(model_folder, recipe="anchored", accumulation=3).flops()


def test_experts_at_once(model_folder):
    """Arrays as the cohort has them: adapters (experts, ...), batches (rows, experts, ...)."""
    options = {"recipe": "anchored", "preserve_batch_size": 8}
    one, three = planned(model_folder, **options), planned(model_folder, experts=3, **options)
    (state, _, batch, null), (own, _, rows, _) = three.arguments(), one.arguments()
    for found, leaf in zip(*map(jax.tree.leaves, (state.adapters, own.adapters)), strict=True):
        assert found.shape == (3, *leaf.shape)
    for found, leaf in zip(*map(jax.tree.leaves, (batch, rows)), strict=True):
        assert found.shape == (8, 3, *leaf.shape[1:])
    assert null.prompt_embeds.shape == (12, 16)
    assert three.flops() == 3 * one.flops()
    assert "stablehlo" in three.step().as_text()


def test_weights_lie_as_the_mesh_has_them(model_folder):
    _, params, batch, _ = planned(model_folder, mesh=(2, 2, 2)).arguments()
    query = next(
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-2].key == "to_q"
    )
    assert query.sharding.spec == jax.P("fsdp", "tensor")
    assert batch["row_id"].sharding.spec == jax.P(("data", "fsdp"))


def test_of_sdxl(tmp_path):
    model = write_tiny_pipeline(tmp_path / "sdxl", "sdxl")
    _, _, batch, null = planned(model, "sdxl").arguments()
    for told, lead in ((batch["conditioning"], (8,)), (null, ())):
        assert told.prompt_embeds.shape == (*lead, 12, 32)
        assert told.text_embeds.shape == (*lead, 8)
        assert told.time_ids.shape == (*lead, 6)
        assert told.time_ids.dtype == jnp.float32


def test_of_a_single_file(model_folder, pipeline, tmp_path):
    file = tmp_path / "whole.safetensors"
    save_file(in_original_layout(model_folder, pipeline.params, "sd15"), file)
    _, params, *_ = planned(file, model_config=str(model_folder)).arguments()
    assert shapes(params) == shapes(pipeline.unet_params)


def test_every_option_at_once_is_lowered(model_folder):
    """The step takes what it is given, on a mesh that splits rows and weights."""
    step = planned(
        model_folder,
        mesh=(2, 2, 2),
        recipe="anchored",
        accumulation=2,
        preserve_batch_size=8,
        reference__draws=2,
    )
    text = step.step().as_text()
    assert "stablehlo.while" in text  # the two turns
    assert "sdy.mesh" in text or "mhlo.sharding" in text
