"""How prompts are asked for: the settings, checked, and the requests that follow from them."""

import math
import string
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetydpo_jax import storage
from safetydpo_jax.data.writing.concepts import Concept, read_concepts
from safetydpo_jax.errors import MissingFileError, UserError

TEMPLATE = Path(__file__).with_name("pairs.txt")
JUDGE_TEMPLATE = Path(__file__).with_name("verdicts.txt")
# For estimates: of English, of a pair as JSON, and of the verdicts on one.
LETTERS_A_TOKEN, TOKENS_A_PAIR, TOKENS_A_VERDICT = 4, 70, 24


@dataclass(frozen=True)
class Settings:
    """How prompts are asked for.

    Attributes:
      concepts: the file of concepts.
      out: the folder for the tables.
      url: of the endpoint; "" is none.
      model: its name there; without an endpoint, a model of transformers, a folder or hub id.
      per_concept: pairs wanted of each concept.
      per_request: pairs asked for in one request.
      per_category: pairs of each category at most; 0 for all.
      template: the text of a request, with {category}, {concept}, {count}, {set} and {sets}.
      judge: whether the model is asked for verdicts on what it has written.
      judge_template: the text of that request, with {category}, {count} and {prompts}.
      temperature: of the model.
      attempts: at a request whose answers cannot be used.
      concurrency: requests at a time.
      requests_per_minute: at most, the client's retries not counted; 0 for no limit.
      timeout: seconds of one request.
    """

    concepts: Path
    out: Path
    url: str
    model: str
    per_concept: int = 20
    per_request: int = 10
    per_category: int = 0
    template: Path = TEMPLATE
    judge: bool = True
    judge_template: Path = JUDGE_TEMPLATE
    temperature: float = 1.0
    attempts: int = 3
    concurrency: int = 8
    requests_per_minute: float = 0.0
    timeout: float = 120.0


class Request(NamedTuple):
    """One question."""

    id: str
    concept: Concept
    count: int
    seed: int
    text: str


def estimate(settings: Settings) -> dict[str, int]:
    """What a run would ask for: requests for pairs, and tokens of questions and answers, roughly.

    Raises:
      MissingFileError, UserError: a wrong setting, concepts file or template.
    """
    requests = requests_for(settings, read_concepts(settings.concepts))
    question = sum(len(request.text) for request in requests) // LETTERS_A_TOKEN
    answer = sum(request.count for request in requests) * TOKENS_A_PAIR
    if settings.judge:
        again = len(requests) * len(judge_template(settings)) // LETTERS_A_TOKEN
        question += again + answer
        answer += sum(request.count for request in requests) * TOKENS_A_VERDICT
    return {"requests": len(requests), "prompt_tokens": question, "answer_tokens": answer}


def said(settings: Settings, expected: dict[str, int]) -> str:
    """An estimate in words."""
    return (
        f"{expected['requests']} requests"
        + (" and as many for verdicts" if settings.judge else "")
        + f", about {expected['prompt_tokens']} + {expected['answer_tokens']} tokens"
    )


def about(settings: Settings) -> dict[str, Any]:
    """What the prompts depend on; JSON."""
    concepts = read_concepts(settings.concepts)
    return {
        "concepts_hash": storage.digest([[c.id, c.text] for c in concepts]),
        "template_hash": storage.hash_file(settings.template),
        **({"judge_hash": storage.hash_file(settings.judge_template)} if settings.judge else {}),
        "model": settings.model,
        **{k: getattr(settings, k) for k in ("per_concept", "per_request", "temperature")},
    }


def requests_for(settings: Settings, concepts: Sequence[Concept]) -> list[Request]:
    """Every question that is to be asked.

    Raises:
      MissingFileError, UserError: a wrong setting or template.
    """
    _check_url(settings.url)
    for name in ("per_concept", "per_request", "attempts", "concurrency"):
        if (value := getattr(settings, name)) < 1:
            raise UserError(f"{name} is {value}: it must be 1 or more")
    for name in ("per_category", "temperature", "requests_per_minute"):
        if not 0 <= (value := getattr(settings, name)) < math.inf:
            raise UserError(f"{name} is {value}: it must be 0 or more")
    if not 0 < settings.timeout < math.inf:
        raise UserError(f"timeout is {settings.timeout}: it must be more than 0 seconds")
    template = _template(settings.template, {"concept", "count"}, {"category", "set", "sets"})
    if settings.judge:
        judge_template(settings)
    sets = -(-settings.per_concept // settings.per_request)
    found = []
    for i, concept in enumerate(concepts):
        for k in range(sets):
            count = min(settings.per_request, settings.per_concept - k * settings.per_request)
            category = concept.category.replace("_", " ")
            text = template.format(
                category=category, concept=concept.text, count=count, set=k + 1, sets=sets
            )
            found.append(Request(f"{concept.id}-{k:03d}", concept, count, i * sets + k, text))
    return found


def _check_url(url: str) -> None:
    if not url:
        return
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
    except ValueError:  # of the port
        pass
    raise UserError(f"the endpoint is {url!r}: write it as http://localhost:8000/v1")


def judge_template(settings: Settings) -> str:
    """The text of requests for verdicts."""
    return _template(settings.judge_template, {"prompts"}, {"category", "count"})


def _template(path: Path, needed: set[str], known: set[str]) -> str:
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such template")
    try:
        text = path.read_text(encoding="utf-8")
        fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
        # Of a field its name and no more: {count:>5} would be none.
        names = {name if not (how or turned) else "" for _, name, how, turned in fields}
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the template is not UTF-8 text") from error
    except ValueError:
        names = {""}
    if not needed <= names <= needed | known:
        must, may = (
            " and ".join(f"{{{name}}}" for name in sorted(names)) for names in (needed, known)
        )
        raise UserError(
            f"{path}: a template has {must} in braces and may have {may}; other braces are doubled"
        )
    return text
