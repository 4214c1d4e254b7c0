"""The DPO loss and its gradients against diffusers' UNet with peft's adapters and autograd."""

import diffusers
import jax
import numpy as np
import peft
import pytest
import torch

from safetydpo_jax import lora, sharding
from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.train.noise import noisy_rows, row_keys
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.step import make_loss

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ROWS, BETA, ALPHA, RANK = 4, 50.0, 8.0, 4


def torch_loss_and_gradients(model, adapters, rows, alphas_cumprod, prediction_type):
    """Diffusion-DPO written anew: its own noising, targets, loss and gradients, NCHW."""
    model.add_adapter(
        peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)), adapter_name="dpo"
    )
    ours = dict(jax.tree_util.tree_flatten_with_path(adapters)[0])
    ours = {".".join(k.key for k in path): np.asarray(x) for path, x in ours.items()}
    theirs = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            key = name.replace(".lora_A.dpo.weight", ".a").replace(".lora_B.dpo.weight", ".b")
            parameter.data = torch.tensor(ours[key].T.copy())
            theirs[key] = parameter
    assert theirs.keys() == ours.keys()

    t = torch.tensor(rows["t"], dtype=torch.long)
    abar = torch.tensor(alphas_cumprod, dtype=torch.float32)[t].view(-1, 1, 1, 1)
    noise, embeds = torch.tensor(rows["noise"]), torch.tensor(rows["prompt_embeds"])

    def errors(x0):
        x0 = torch.tensor(x0)
        noisy = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        epsilon = prediction_type == "epsilon"
        target = noise if epsilon else abar.sqrt() * noise - (1 - abar).sqrt() * x0
        answer = model(noisy.permute(0, 3, 1, 2), t, encoder_hidden_states=embeds).sample
        return (answer.permute(0, 2, 3, 1) - target).pow(2).mean((1, 2, 3))

    winner, loser = errors(rows["winner"]), errors(rows["loser"])
    model.disable_adapters()
    with torch.no_grad():
        winner_ref, loser_ref = errors(rows["winner"]), errors(rows["loser"])
    model.enable_adapters()
    margin = -BETA / 2 * ((winner - loser) - (winner_ref - loser_ref))
    loss = -torch.nn.functional.logsigmoid(margin).mean()
    loss.backward()
    gradients = {key: parameter.grad.numpy().T for key, parameter in theirs.items()}
    model.delete_adapters("dpo")
    return loss.item(), margin.detach().numpy(), gradients


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_loss_and_gradients(prediction_type, config, pipeline, model_folder):
    model, params = pipeline.unet, pipeline.unet_params
    torch_unet = diffusers.UNet2DConditionModel.from_pretrained(model_folder / "unet").eval()
    schedule = NoiseSchedule(beta_schedule="scaled_linear", prediction_type=prediction_type)
    config.recipe, config.loss.caption_dropout = "paper", 0.0
    config.loss.beta = BETA
    config.lora.rank, config.lora.alpha = RANK, ALPHA
    config = resolve(config)
    adapters = lora.init_adapters(jax.random.key(0), params, rank=RANK, targets=TARGETS)
    adapters = jax.tree.map(
        lambda x: x + 0.1 * np.random.default_rng(x.size).normal(size=x.shape).astype("f4"),
        adapters,
    )
    rng = np.random.default_rng(0)
    moments = [
        {
            "mean": rng.normal(size=(ROWS, 8, 8, 4)).astype("f4"),
            "logvar": np.full((ROWS, 8, 8, 4), -80, "f4"),
        }
        for _ in range(2)
    ]
    batch = {
        "winner": moments[0],
        "loser": moments[1],
        "prompt_embeds": rng.normal(size=(ROWS, 5, 16)).astype("f4"),
        "row_id": np.arange(ROWS, dtype=np.uint32),
        "draw": np.zeros(ROWS, np.uint32),
    }
    null = np.zeros((5, 16), np.float32)
    loss = make_loss(model, schedule, config, sharding.make_mesh(devices=jax.devices()[:1]))
    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        adapters, params, batch, null
    )
    assert len(jax.tree.leaves(gradients)) == 2 * 8 * 4

    keys = row_keys(jax.random.key(config.seed), batch["row_id"], batch["draw"])
    drawn = noisy_rows(
        keys,
        moments,
        batch["prompt_embeds"],
        null,
        schedule,
        t_min=0,
        t_max=1000,
        caption_dropout=0.0,
    )
    _, noise = schedule.to_x0_and_noise(drawn.targets[0], drawn.latents[0], drawn.timesteps)
    rows = {
        "winner": moments[0]["mean"],
        "loser": moments[1]["mean"],
        "prompt_embeds": batch["prompt_embeds"],
        "t": np.asarray(drawn.timesteps),
        "noise": np.asarray(noise),
    }
    expected, margin, torch_gradients = torch_loss_and_gradients(
        torch_unet, adapters, rows, schedule.alphas_cumprod, prediction_type
    )
    assert 0.3 < np.abs(margin).mean() < 10
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["margin"], margin.mean(), rtol=1e-4)
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        theirs = torch_gradients[".".join(key.key for key in path)]
        error = np.linalg.norm(gradient - theirs) / np.linalg.norm(theirs)
        assert error < 1e-4, (path, error)
