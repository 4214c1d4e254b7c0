"""How every test runs: offline, on emulated devices, with array annotations checked."""

import os

# Read when JAX and the Hugging Face libraries are imported, so they come before any import.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# PyTorch's threads wait by spinning, which on two busy cores costs more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

install_import_hook("safetydpo_jax", "tests.check")
