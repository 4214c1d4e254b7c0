"""How every test runs: offline, on emulated devices, with array annotations checked."""

import http.server
import os
import threading
from pathlib import Path

# Read when JAX and the Hugging Face libraries are imported, so they come before any import.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests compile the same small models again and again, here and in the processes that they start.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Else gcsfs asks for each file what kind of bucket it is in, which the emulator does not know.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# PyTorch's threads wait by spinning, which on two busy cores costs more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("safetydpo_jax", "tests.check")


# Most tests compile more than they compute: for them LLVM leaves out what takes it long. Not for
# the processes that they start, some of which draw.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimised():
    """For tests of what the compiler makes of a program, or that compute more than they compile.

    And of the same bits from two programs, one of which LLVM would round in another order.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Stable Diffusion checkpoint of a few thousand random numbers; only to be read."""
    from tests.diffusion.tiny_pipeline import write_tiny_pipeline  # after the hook

    return write_tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def pipeline(model_folder):
    """That checkpoint, loaded."""
    from safetydpo_jax.models.pretrained import load_pipeline

    return load_pipeline(model_folder)


@pytest.fixture(scope="session")
def bucket_server():
    """The URL of a server that speaks Google Cloud Storage's protocol."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.server import create_server

    decode = server._decode_raw_data

    def whole(raw, handler):
        """It takes a file's last byte for a part of the line's end, if that is a \\r."""
        raw, end = decode(raw, handler), b"\n--==0==--"
        return raw.removesuffix(end) + b"\r" + end if raw.endswith(end) else raw

    server._decode_raw_data = whole
    handle, one_at_a_time = server.Router.handle, threading.Lock()

    def handle_alone(router, method):
        """Its threads share dictionaries, and change them while others write them down."""
        with one_at_a_time:
            handle(router, method)

    server.Router.handle = handle_alone
    found = create_server("127.0.0.1", 0, in_memory=True, default_bucket="bucket")
    with pytest.MonkeyPatch.context() as context:
        # One connection at a time, a client that says nothing would keep the others waiting.
        context.setattr(http.server, "HTTPServer", http.server.ThreadingHTTPServer)
        found.start()
    yield f"http://127.0.0.1:{found._api._httpd.server_address[1]}"
    found.stop()


@pytest.fixture
def bucket(bucket_server, tmp_path, monkeypatch):
    """A folder of a test's own in the bucket; what is fetched from it lies in tmp_path/fetched."""
    from etils import epath

    from safetydpo_jax.remote import CACHE_DIR

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket_server)
    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "fetched"))
    return epath.Path(f"gs://bucket/{tmp_path.name}")
