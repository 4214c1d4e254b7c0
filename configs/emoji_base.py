r"""The base model of the embedded world: a small Stable Diffusion for 64 x 64 px emoji scenes.

    python launch/pretrain.py --config configs/emoji_base.py --workdir runs/emoji_base

On two CPU cores: 21 minutes for the autoencoder (31.2 dB), 5 for the latents, 86 for the denoiser,
which then draws 92 to 94 % of single pictograms as asked. The shipped model went on from there on
fresh pictures, for 73 minutes more (benchmarks/results/emoji_base_training.json):

    python launch/pretrain.py --config configs/emoji_base.py --workdir runs/emoji_base_2 \
        --config.init.path=runs/emoji_base/pipeline --config.data.seed=1 \
        --config.denoiser_training.learning_rate=1.5e-3 \
        --config.denoiser_training.steps=3700 --config.denoiser_training.decay_steps=3550

To train a base of your own, set `config.data.source` to a folder with pictures and a metadata.csv
(columns file_name,text).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Sizes, training and data of the embedded base."""
    config = ml_collections.ConfigDict()
    config.seed = 0
    # A checkpoint to begin with, and what to take from it instead of what is set below: "vae" is
    # kept as it is, "text_encoder" (with the tokenizer) and "unet" are trained on.
    config.init = {"path": "", "parts": ("vae", "text_encoder", "unet")}
    config.data = {"source": "emoji", "count": 60_000, "seed": 0, "resolution": 64}
    config.tokenizer = {"max_length": 24, "vocab_size": 2048}
    config.vae = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 8,
        "layers_per_block": 1,
        "mid_block_add_attention": False,
        "norm_num_groups": 8,
        "sample_size": 64,
    }
    config.text_encoder = {
        "architectures": ("CLIPTextModel",),
        "model_type": "clip_text_model",
        "hidden_act": "quick_gelu",
        "hidden_size": 160,
        "intermediate_size": 640,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "projection_dim": 160,
    }
    # Convolutions alone at 16 x 16, attention at 8 x 8: where a CPU is fast.
    config.unet = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 4,
        "block_out_channels": (64, 192),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 160,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 8,
        "out_channels": 8,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "use_linear_projection": True,
    }
    config.scheduler = {
        "_class_name": "DDIMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    common = {
        "optimizer": "adamw",
        "b2": 0.99,
        "weight_decay": 1e-4,
        "log_every": 50,
        "matmul_precision": "bfloat16",
    }
    config.autoencoder_training = {
        **common,
        "steps": 4_200,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "decay_steps": 1_400,
        "average_decay": 0.998,
        "save_every": 500,
        "absolute_weight": 0.02,
        "kl_weight": 1e-4,
    }
    config.denoiser_training = {
        **common,
        "optimizer": "muon",
        "steps": 4_250,
        "batch_size": 64,
        "learning_rate": 2e-3,
        "warmup_steps": 100,
        "decay_steps": 2_950,
        "average_decay": 0.998,
        "save_every": 300,
        "caption_dropout": 0.1,
        "timestep_mean": 0.4,
        "timestep_spread": 1.4,
    }
    return config
