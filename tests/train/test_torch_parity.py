"""Every preference loss and its gradients against diffusers' UNet, peft's adapters and autograd."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from safetydpo_jax import lora, sharding
from safetydpo_jax.diffusion.schedule import NoiseSchedule
from safetydpo_jax.models.conditioning import Conditioning
from safetydpo_jax.train.noise import noisy_rows, row_keys
from safetydpo_jax.train.settings import resolve
from safetydpo_jax.train.state import TrainState, make_optimizer
from safetydpo_jax.train.step import make_train_step, numbers_of

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
ROWS, BETA, ALPHA, RANK = 4, 50.0, 8.0, 4


# As published, with h = margin / beta.
TORCH_LOSSES = {
    "dpo": lambda h: -torch.nn.functional.logsigmoid(BETA * h),
    "ipo": lambda h: BETA**2 * (h - 1 / (2 * BETA)) ** 2,
    "hinge": lambda h: torch.relu(1 - BETA * h),
    "winner_preserving": lambda h: -torch.nn.functional.logsigmoid(BETA * h),
}


def torch_loss_and_gradients(model, adapters, rows, alphas_cumprod, prediction_type, preference):
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
    h = -1 / 2 * ((winner - loser) - (winner_ref - loser_ref))
    loss = TORCH_LOSSES[preference](h).mean()
    if preference == "winner_preserving":
        weights = BETA / 2 * torch.sigmoid(-BETA * h.detach()) / ROWS
        of_winner, of_loser = (
            torch.autograd.grad((weights * x).sum(), theirs.values(), retain_graph=True)
            for x in (winner, loser)
        )
        squared = sum(x.pow(2).sum() for x in of_winner)
        product = sum((x * y).sum() for x, y in zip(of_winner, of_loser, strict=True))
        scale = min(1.0, (squared / product).item()) if product > 0 else 1.0
        assert 0 < scale < 0.9
        gradients = [x - scale * y for x, y in zip(of_winner, of_loser, strict=True)]
    else:
        gradients = torch.autograd.grad(loss, theirs.values())
    gradients = {key: x.numpy().T for key, x in zip(theirs, gradients, strict=True)}
    model.delete_adapters("dpo")
    return loss.item(), BETA * h.detach().numpy(), gradients


@pytest.mark.parametrize(
    ("prediction_type", "preference"),
    [
        ("epsilon", "dpo"),
        ("v_prediction", "ipo"),
        ("epsilon", "hinge"),
        ("epsilon", "winner_preserving"),
    ],
)
def test_loss_and_gradients(prediction_type, preference, config, pipeline, model_folder):
    model, params = pipeline.unet, pipeline.unet_params
    torch_unet = diffusers.UNet2DConditionModel.from_pretrained(model_folder / "unet").eval()
    schedule = NoiseSchedule(beta_schedule="scaled_linear", prediction_type=prediction_type)
    config.recipe, config.loss.caption_dropout = "paper", 0.0
    config.loss.beta, config.loss.preference = BETA, preference
    config.optimizer.clip_norm = 1e9
    config.lora.rank, config.lora.alpha = RANK, ALPHA
    config = resolve(config)
    adapters = lora.init_adapters(jax.random.key(0), params, rank=RANK, targets=TARGETS)
    adapters = jax.tree.map(
        lambda x: x + 0.1 * np.random.default_rng(x.size).normal(size=x.shape).astype("f4"),
        adapters,
    )
    rng = np.random.default_rng(0)
    # Alike, and the loser nearer to nothing: its gradient opposes the winner's and is the stronger.
    shape = (ROWS, 8, 8, 4)
    loser = rng.normal(size=shape).astype("f4")
    winner = 2 * loser + rng.normal(scale=0.3, size=shape).astype("f4")
    moments = [{"mean": x, "logvar": np.full(shape, -80, "f4")} for x in (winner, loser)]
    batch = {
        "winner": moments[0],
        "loser": moments[1],
        "conditioning": Conditioning(rng.normal(size=(ROWS, 5, 16)).astype("f4")),
        "row_id": np.arange(ROWS, dtype=np.uint32),
        "draw": np.zeros(ROWS, np.uint32),
    }
    null = Conditioning(np.zeros((5, 16), np.float32))
    step = make_train_step(model, schedule, config, sharding.make_mesh(devices=jax.devices()[:1]))
    state = TrainState.create(jax.tree.map(jnp.copy, adapters), make_optimizer(config))
    state, metrics = step(state, params, batch, null, numbers_of(config)(0))
    # Adam's first moment after one step is the gradient's share 1 - b1.
    gradients = jax.tree.map(lambda x: x / (1 - config.optimizer.b1), state.opt_state[1][0].mu)
    assert len(jax.tree.leaves(gradients)) == 2 * 8 * 4

    keys = row_keys(jax.random.key(config.seed), batch["row_id"], batch["draw"])
    drawn = noisy_rows(
        keys,
        moments,
        batch["conditioning"],
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
        "prompt_embeds": batch["conditioning"].prompt_embeds,
        "t": np.asarray(drawn.timesteps),
        "noise": np.asarray(noise),
    }
    expected, margin, torch_gradients = torch_loss_and_gradients(
        torch_unet, adapters, rows, schedule.alphas_cumprod, prediction_type, preference
    )
    assert margin.min() < 0.5 < 1 < margin.max() < 10  # so that a hinge lets some pairs be
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["margin"], margin.mean(), rtol=1e-4)
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        theirs = torch_gradients[".".join(key.key for key in path)]
        error = np.linalg.norm(gradient - theirs) / np.linalg.norm(theirs)
        assert error < 1e-4, (path, error)
