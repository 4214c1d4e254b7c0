"""Our forward pass and DPO step against PyTorch's, side by side on this machine.

    python benchmarks/true_size.py --models sd15 --folder runs/true_size   # writes the checkpoint
    python benchmarks/against_torch.py --checkpoint runs/true_size/sd15
    python benchmarks/against_torch.py --checkpoint runs/true_size/sd15 --pixels 512 --remat

Each contender is a process of its own that has loaded the same weights, float32. Ours meets each of
the others in turn, since three at once want more memory than 24 GB; the two take turns, so that
whatever else the machine does befalls both, and the second of two runs in a row is timed:

    ours       the training step of the recipe `paper`, from cached latents and text states
    diffusers  the same work in PyTorch: one UNet with a LoRA of peft, which is switched off for the
               reference; latents and text states given
    official   what the published training script does in its step: a policy and a reference UNet,
               the autoencoder's encoder on both pictures, and the text encoder

"forward" is one UNet pass over the pair's two rows, without a LoRA and without a gradient. Writes
benchmarks/results/against_torch_PIXELS.json.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks and configs

from benchmarks.machine import machine
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[1]
RANK, BETA, LEARNING_RATE = 4, 5000.0, 1e-5
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def main() -> None:
    """Lets the contenders take turns, and writes medians and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", action="store_true", help="config.remat in our step")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    args = parser.parse_args()
    result = {
        "machine": machine(),
        "pixels": args.pixels,
        "pairs_in_a_step": 1,
        "remat": args.remat,
        "against": {rival: meet(rival, args) for rival in args.rivals},
    }
    if not args.rivals:
        result["alone"] = meet(None, args)
    path = ROOT / "benchmarks" / "results" / f"against_torch_{args.pixels}.json"
    write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))
    print(f"written: {path}")


def meet(rival: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Ours and one rival, or ours alone: median seconds of both, and peaks of memory."""
    context, processes, pipes = multiprocessing.get_context("spawn"), [], {}
    for name in ("ours", rival) if rival else ("ours",):
        pipes[name], theirs = context.Pipe()
        what = (name, args.checkpoint, args.pixels, args.remat, theirs)
        processes.append(context.Process(target=contend, args=what, daemon=True))
        processes[-1].start()
        theirs.close()  # so that we hear of it when they die
        print(f"{name}: {ask(name, pipes[name])}", flush=True)
    found: dict[str, Any] = {}
    for work in ("forward", "step"):
        seconds: dict[str, list[float]] = {name: [] for name in pipes}
        for turn in range(args.rounds + 1):
            for name, pipe in pipes.items():
                took = ask(name, pipe, work)
                print(f"{turn}/{args.rounds} {work} {name}: {took:.2f} s", flush=True)
                if turn:  # the first compiles
                    seconds[name].append(took)
        medians = {name: statistics.median(x) for name, x in seconds.items()}
        found[f"{work}_seconds"] = {name: round(x, 2) for name, x in medians.items()}
        if rival:
            found[f"{work}_ratio"] = round(medians[rival] / medians["ours"], 2)
    for name, pipe in pipes.items():
        found[f"{name}_peak_resident_mb"] = ask(name, pipe, "peak")
    for process in processes:
        process.join()
    return found


def ask(name: str, pipe: Any, work: str | None = None) -> Any:
    """A contender's answer to what it is told to do."""
    try:
        if work:
            pipe.send(work)
        return pipe.recv()
    except (EOFError, BrokenPipeError):
        raise UserError(
            f"{name} ended at {work or 'loading'}: its error is above, if it was no lack of memory"
        ) from None


def contend(name: str, checkpoint: Path, pixels: int, remat: bool, pipe: Any) -> None:
    """A contender's process: does the work it is told to, and answers with the seconds."""
    from benchmarks.memory import Memory

    with Memory() as memory:
        load = ours if name == "ours" else RIVALS[name]
        works = load(checkpoint, pixels, remat)
        pipe.send("loaded")
        while (work := pipe.recv()) != "peak":
            works[work]()
            started = time.perf_counter()
            works[work]()
            pipe.send(time.perf_counter() - started)
    pipe.send(memory.resident)


Works = dict[str, Callable[[], None]]


def ours(checkpoint: Path, pixels: int, remat: bool) -> Works:
    """JAX, as `launch/train.py` runs it."""
    import jax

    from benchmarks.dpo_step import make_case
    from safetydpo_jax.host_memory import give_back
    from safetydpo_jax.models.pretrained import load_pipeline

    pipe = load_pipeline(checkpoint)
    pipe.networks["unet"] = pipe.unet.clone(remat=remat)
    null = jax.tree.map(lambda x: x[0], pipe.encode_negative([""]))
    del pipe.params["vae"]  # what the cache has done is not needed in training
    case = make_case(pipe, null, "paper", pixels, RANK)
    apply, batch = jax.jit(pipe.unet.apply), case.batch
    latents = np.concatenate([batch["winner"]["mean"], batch["loser"]["mean"]])
    told = jax.tree.map(lambda x: np.concatenate([x, x]), batch["conditioning"])
    step = case.step.lower(case.state, pipe.unet_params, batch, null, case.numbers).compile()
    give_back()  # as training does

    def forward() -> None:
        variables = {"params": pipe.unet_params}
        jax.block_until_ready(apply(variables, latents, np.full(2, 500), *told))

    def train() -> None:
        case.state, metrics = step(case.state, pipe.unet_params, batch, null, case.numbers)
        jax.block_until_ready(metrics)

    return {"forward": forward, "step": train}


def diffusers_and_peft(checkpoint: Path, pixels: int, remat: bool) -> Works:
    """PyTorch, with as little work in the step as ours has."""
    return _torch(checkpoint, pixels, official=False)


def official(checkpoint: Path, pixels: int, remat: bool) -> Works:
    """PyTorch, with the work that the published script has in its step."""
    return _torch(checkpoint, pixels, official=True)


def _torch(checkpoint: Path, pixels: int, official: bool) -> Works:
    import diffusers
    import peft
    import torch
    import transformers

    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    unet.requires_grad_(False)
    reference = None
    if official:
        reference = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
        reference.requires_grad_(False)
        vae = diffusers.AutoencoderKL.from_pretrained(checkpoint, subfolder="vae")
        text = transformers.CLIPTextModel.from_pretrained(checkpoint, subfolder="text_encoder")
        vae.requires_grad_(False)
        text.requires_grad_(False)
    scheduler = diffusers.DDPMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LAYERS
    )
    unet.add_adapter(settings)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    torch.manual_seed(0)
    side = pixels // 8
    pictures, latents = torch.rand(2, 3, pixels, pixels) * 2 - 1, torch.randn(2, 4, side, side)
    ids, states = torch.randint(0, 49000, (1, 77)), torch.randn(1, 77, 768)

    def forward() -> None:
        unet.disable_adapters()
        with torch.no_grad():
            unet(latents, 500, states.repeat(2, 1, 1))
        unet.enable_adapters()

    def step() -> None:
        clean, prompt = latents, states
        if official:
            with torch.no_grad():
                clean = vae.encode(pictures).latent_dist.sample() * vae.config.scaling_factor
                prompt = text(ids).last_hidden_state
        timesteps = torch.randint(0, 1000, (1,)).repeat(2)
        noise = torch.randn(1, *clean.shape[1:]).repeat(2, 1, 1, 1)
        noisy, prompts = scheduler.add_noise(clean, noise, timesteps), prompt.repeat(2, 1, 1)
        policy = (unet(noisy, timesteps, prompts).sample - noise).square().mean((1, 2, 3))
        with torch.no_grad():
            if reference is None:
                unet.disable_adapters()
                base = unet(noisy, timesteps, prompts).sample
                unet.enable_adapters()
            else:
                base = reference(noisy, timesteps, prompts).sample
            base = (base - noise).square().mean((1, 2, 3))
        margin = -0.5 * BETA * ((policy[0] - base[0]) - (policy[1] - base[1]))
        loss = -torch.nn.functional.logsigmoid(margin)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "step": step}


RIVALS = {"diffusers": diffusers_and_peft, "official": official}

if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
