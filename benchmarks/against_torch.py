"""Our forward pass and DPO step against PyTorch's, side by side on this machine.

    python benchmarks/true_size.py --models sd15 --folder runs/true_size   # writes the checkpoint
    python benchmarks/against_torch.py --checkpoint runs/true_size/sd15
    python benchmarks/against_torch.py --checkpoint runs/true_size/sd15 --pixels 512 --remat
    python benchmarks/against_torch.py --checkpoint runs/true_size/sd15 --pairs 2
    python benchmarks/against_torch.py --pixels 64 --pairs 8 \
        --checkpoint safetydpo_jax/emoji/pipeline --name emoji

Each contender is a process of its own that has loaded the same weights, float32. Ours meets each of
the others in turn, since three at once want more memory than 24 GB; the two take turns, so that
whatever else the machine does befalls both, and the second of two runs in a row is timed:

    ours       the training step of the recipe `paper`, from cached latents and text states
    diffusers  the same work in PyTorch: one UNet with a LoRA of peft, which is switched off for the
               reference; latents and text states given
    official   what the published training script does in its step: a policy and a reference UNet,
               the autoencoder's encoder on both pictures, and the text encoder

"forward" is one UNet pass over the pairs' rows, without a LoRA and without a gradient;
"step_with_table" is our step with the base's answers known (`config.reference.draws`), without what
it took to ask for them, against the others' whole step. Peaks of memory are of the first two.
Writes benchmarks/results/against_torch_MODEL_PIXELS.json, with several pairs a step
..._PIXELS_PAIRS_pairs.json, with remat ..._remat.json.
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks and configs

from benchmarks.machine import machine
from safetydpo_jax.errors import UserError, run_main
from safetydpo_jax.host_memory import use_huge_pages
from safetydpo_jax.storage import write_file

ROOT = Path(__file__).resolve().parents[1]
RANK, BETA, LEARNING_RATE = 4, 5000.0, 1e-5
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
WORKS = {"forward": "forward", "step": "step", "step_with_table": "step"}  # ours: the other's


class Case(NamedTuple):
    """What all contenders work on."""

    checkpoint: Path
    pixels: int
    pairs: int
    remat: bool


def main() -> None:
    """Lets the contenders take turns, and writes medians and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--name", help="of the model in the result (the folder's)")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=1, help="in a step (1)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--remat", action="store_true", help="config.remat in our step")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    args = parser.parse_args()
    case = Case(args.checkpoint, args.pixels, args.pairs, args.remat)
    result = {
        "machine": machine(),
        "model": args.name or args.checkpoint.name,
        "pixels": args.pixels,
        "pairs_in_a_step": args.pairs,
        "rounds": args.rounds,
        "remat": args.remat,
        "against": {rival: meet(rival, case, args.rounds) for rival in args.rivals},
    }
    if not args.rivals:
        result["alone"] = meet(None, case, args.rounds)
    name = f"against_torch_{result['model']}_{args.pixels}"
    name += f"_{args.pairs}_pairs" * (args.pairs > 1) + "_remat" * args.remat
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    write_file(path, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))
    print(f"written: {path}")


def meet(rival: str | None, case: Case, rounds: int) -> dict[str, Any]:
    """Ours and one rival, or ours alone: median seconds of both, and peaks of memory."""
    context, processes, pipes = multiprocessing.get_context("spawn"), [], {}
    for name in ("ours", rival) if rival else ("ours",):
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=contend, args=(name, case, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that we hear of it when they die
        print(f"{name}: {ask(name, pipes[name])}", flush=True)
    found: dict[str, Any] = {}
    for work, theirs_is in WORKS.items():
        seconds: dict[str, list[float]] = {name: [] for name in pipes}
        for turn in range(rounds + 1):
            for name, pipe in pipes.items():
                took = ask(name, pipe, work if name == "ours" else theirs_is)
                print(f"{turn}/{rounds} {work} {name}: {took:.2f} s", flush=True)
                if turn:  # the first compiles
                    seconds[name].append(took)
        medians = {name: statistics.median(x) for name, x in seconds.items()}
        found[f"{work}_seconds"] = {name: round(x, 2) for name, x in medians.items()}
        if rival:
            found[f"{work}_ratio"] = round(medians[rival] / medians["ours"], 2)
        if work == "step":
            for name, pipe in pipes.items():
                found[f"{name}_peak_resident_mb"] = ask(name, pipe, "peak")
    for pipe in pipes.values():
        pipe.send("end")
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


def contend(name: str, case: Case, pipe: Any) -> None:
    """A contender's process: does the work it is told to, and answers with the seconds."""
    from benchmarks.memory import Memory

    with Memory() as memory:
        load = ours if name == "ours" else RIVALS[name]
        works = load(case)
        pipe.send("loaded")
        while (work := pipe.recv()) != "end":
            if work == "peak":
                pipe.send(memory.resident)
                continue
            works[work]()
            started = time.perf_counter()
            works[work]()
            pipe.send(time.perf_counter() - started)


Works = dict[str, Callable[[], None]]


def ours(given: Case) -> Works:
    """JAX, as `launch/train.py` runs it."""
    import jax

    from benchmarks.dpo_step import make_case
    from safetydpo_jax.host_memory import give_back
    from safetydpo_jax.models.pretrained import load_pipeline
    from safetydpo_jax.train.reference import make_answers

    pipe = load_pipeline(given.checkpoint)
    pipe.networks["unet"] = pipe.unet.clone(remat=given.remat)
    null = jax.tree.map(lambda x: x[0], pipe.encode_negative([""]))
    del pipe.params["vae"]  # what the cache has done is not needed in training
    case = make_case(pipe, null, "paper", given.pixels, RANK, pairs=given.pairs)
    apply, batch = jax.jit(pipe.unet.apply), case.batch
    latents = np.concatenate([batch["winner"]["mean"], batch["loser"]["mean"]])
    told = jax.tree.map(lambda x: np.concatenate([x, x]), batch["conditioning"])
    compiled = case.step.lower(case.state, pipe.unet_params, batch, null, case.numbers).compile()
    give_back()  # as training does

    def forward() -> None:
        variables = {"params": pipe.unet_params}
        jax.block_until_ready(apply(variables, latents, np.full(len(latents), 500), *told))

    def train(step: Any = compiled, rows: Any = batch) -> None:
        case.state, metrics = step(case.state, pipe.unet_params, rows, null, case.numbers)
        jax.block_until_ready(metrics)

    @functools.cache
    def known() -> Any:
        errors = make_answers(pipe, case.config, case.mesh)["errors"]
        return batch | {"reference": {"errors": np.asarray(errors(pipe.unet_params, batch, null))}}

    return {
        "forward": forward,
        "step": train,
        "step_with_table": lambda: train(case.step, known()),
    }


def diffusers_and_peft(given: Case) -> Works:
    """PyTorch, with as little work in the step as ours has."""
    return _torch(given, official=False)


def official(given: Case) -> Works:
    """PyTorch, with the work that the published script has in its step."""
    return _torch(given, official=True)


def _torch(given: Case, official: bool) -> Works:
    import diffusers
    import peft
    import torch
    import transformers

    checkpoint, n = given.checkpoint, given.pairs
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    unet.requires_grad_(False)
    reference = None
    if official:
        reference = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
        reference.requires_grad_(False)
        vae = diffusers.AutoencoderKL.from_pretrained(checkpoint, subfolder="vae")
        text = transformers.CLIPTextModel.from_pretrained(checkpoint, subfolder="text_encoder")
        text = text.float()  # which comes as it lies on the disk
        vae.requires_grad_(False)
        text.requires_grad_(False)
    scheduler = diffusers.DDPMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    velocity = scheduler.config.prediction_type == "v_prediction"
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LAYERS
    )
    unet.add_adapter(settings)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    torch.manual_seed(0)
    pixels = given.pixels
    levels = diffusers.AutoencoderKL.load_config(checkpoint, subfolder="vae")["block_out_channels"]
    tokens = transformers.CLIPTextConfig.from_pretrained(checkpoint, subfolder="text_encoder")
    length = tokens.max_position_embeddings
    pictures = torch.rand(2 * n, 3, pixels, pixels) * 2 - 1  # the winners, then the losers
    latents = torch.randn(2 * n, unet.config.in_channels, *[pixels >> len(levels) - 1] * 2)
    ids = torch.randint(0, tokens.vocab_size, (n, length))
    states = torch.randn(n, length, unet.config.cross_attention_dim)

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
        timesteps = torch.randint(0, 1000, (n,)).repeat(2)
        noise = torch.randn(n, *clean.shape[1:]).repeat(2, 1, 1, 1)
        noisy, prompts = scheduler.add_noise(clean, noise, timesteps), prompt.repeat(2, 1, 1)
        target = scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
        policy = (unet(noisy, timesteps, prompts).sample - target).square().mean((1, 2, 3))
        with torch.no_grad():
            if reference is None:
                unet.disable_adapters()
                base = unet(noisy, timesteps, prompts).sample
                unet.enable_adapters()
            else:
                base = reference(noisy, timesteps, prompts).sample
            base = (base - target).square().mean((1, 2, 3))
        winner, loser = (policy - base).split(n)
        loss = -torch.nn.functional.logsigmoid(-0.5 * BETA * (winner - loser)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "step": step}


RIVALS = {"diffusers": diffusers_and_peft, "official": official}

if __name__ == "__main__":
    use_huge_pages()
    run_main(main)
