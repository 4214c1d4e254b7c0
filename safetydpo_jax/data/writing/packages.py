"""The packages that only the writing of prompts takes, the extra `llm`."""

import importlib
from typing import Any

from safetydpo_jax.errors import UserError


def needed(name: str, extra: str = "llm") -> Any:
    """The package, which comes with this extra.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"writing prompts takes more packages: pip install 'safetydpo-jax[{extra}]'"
        ) from error
