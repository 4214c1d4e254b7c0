"""YAML files of the user's; an error tells the place, never the text, which may be a harm's."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from safetydpo_jax.errors import UserError

# What PyYAML raises for a value that its tag does not fit, such as a date or a truth value.
_OF_TAGS = (ValueError, KeyError, AttributeError, IndexError, TypeError)


def read_yaml(file: Path, shown: str) -> Any:
    """What a file says.

    Args:
        file: UTF-8, with or without a byte order mark.
        shown: where or how such a file is written, for errors.

    Raises:
        UserError: it is no UTF-8, no YAML, or a key is given twice.
    """
    try:
        return yaml.load(file.read_text("utf-8-sig"), _Loader)
    except UnicodeDecodeError:
        raise UserError(f"{file}: the file is not UTF-8 text") from None
    except (yaml.YAMLError, *_OF_TAGS, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(  # PyYAML's own message quotes the text
            f"{file}{line}: not valid YAML, or a key given twice; {shown}"
        ) from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which PyYAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if any(keys.count(key) > 1 for key in keys):
            raise yaml.MarkedYAMLError(problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)
