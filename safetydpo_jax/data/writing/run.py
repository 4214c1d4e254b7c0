"""The run: every request that is not answered yet, several at a time; then the tables."""

import asyncio
import collections
import json
import math
import string
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetydpo_jax import storage
from safetydpo_jax.data.writing.answers import PromptPair, UnusableAnswerError, read_answer
from safetydpo_jax.data.writing.concepts import Concept, read_concepts
from safetydpo_jax.data.writing.endpoint import Endpoint
from safetydpo_jax.data.writing.journal import Journal
from safetydpo_jax.data.writing.tables import write_tables
from safetydpo_jax.errors import MissingFileError, UserError
from safetydpo_jax.pace import Pace

TEMPLATE = Path(__file__).with_name("pairs.txt")
# For estimates: of English, and of a pair as JSON.
LETTERS_A_TOKEN, TOKENS_A_PAIR = 4, 70


@dataclass(frozen=True)
class Settings:
    """How prompts are asked for.

    Attributes:
      concepts: the file of concepts.
      out: the folder for the tables.
      url: of the endpoint, and
      model: its name there.
      per_concept: pairs wanted of each concept.
      per_request: pairs asked for in one request.
      per_category: pairs of each category at most; 0 for all.
      template: the text of a request, with {category}, {concept}, {count}, {set} and {sets}.
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
    """What a run would ask for: requests, and tokens of questions and answers, roughly.

    Raises:
      MissingFileError, UserError: a wrong setting, concepts file or template.
    """
    requests = _requests(settings, read_concepts(settings.concepts))
    return {
        "requests": len(requests),
        "prompt_tokens": sum(len(request.text) for request in requests) // LETTERS_A_TOKEN,
        "answer_tokens": sum(request.count for request in requests) * TOKENS_A_PAIR,
    }


def write_prompts(settings: Settings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Asks for what is not answered yet and writes `out`/CATEGORY/prompts.csv and report.json.

    Args:
      settings: of the run.
      progress: takes lines of text: done, rate, time left, tokens; never a prompt.

    Returns:
      The report: by category what was written and kept, and reasons for what was not.

    Raises:
      MissingFileError, UserError: a wrong setting, concepts file or template, an endpoint that is
        not there or refuses, a journal of other settings, no pair at all, or a full disk.
    """
    _check_url(settings.url)
    concepts = read_concepts(settings.concepts)
    requests = _requests(settings, concepts)
    about = {
        "concepts_hash": storage.digest([[c.id, c.text] for c in concepts]),
        "template_hash": storage.hash_file(settings.template),
        "model": settings.model,
        **{k: getattr(settings, k) for k in ("per_concept", "per_request", "temperature")},
    }
    journal = Journal(settings.out / "journal.jsonl", about)
    try:
        left = [request for request in requests if request.id not in journal.answers]
        progress(
            f"{len(concepts)} concepts, {len(requests)} requests, "
            f"{len(requests) - len(left)} answered before"
        )
        failed = asyncio.run(_ask_all(settings, left, journal, progress)) if left else {}
    finally:
        journal.close()
    pairs: dict[str, list[PromptPair]] = collections.defaultdict(list)
    faults = collections.Counter()
    for request in requests:
        if answer := journal.answers.get(request.id):
            pairs[request.concept.id] += [PromptPair(*pair) for pair in answer["pairs"]]
            faults.update(answer["faults"])
    counts = write_tables(settings.out, concepts, pairs, settings.per_category)
    report = {
        "settings": about,
        "categories": counts,
        "left_out": dict(faults.most_common()),
        "requests": len(requests),
        "unanswered": dict(collections.Counter(failed.values()).most_common()),
        "unanswered_ids": failed,
    }
    text = json.dumps(report, indent=2) + "\n"
    with storage.explained_writes(settings.out):
        storage.write_file(settings.out / "report.json", text.encode())
    if not any(count["kept"] for count in counts.values()):
        raise UserError(f"no pair could be used: {settings.out / 'report.json'} says why")
    return report


def _requests(settings: Settings, concepts: Sequence[Concept]) -> list[Request]:
    for name in ("per_concept", "per_request", "attempts", "concurrency"):
        if (value := getattr(settings, name)) < 1:
            raise UserError(f"{name} is {value}: it must be 1 or more")
    for name in ("per_category", "temperature", "requests_per_minute"):
        if not 0 <= (value := getattr(settings, name)) < math.inf:
            raise UserError(f"{name} is {value}: it must be 0 or more")
    if not 0 < settings.timeout < math.inf:
        raise UserError(f"timeout is {settings.timeout}: it must be more than 0 seconds")
    template = _template(settings.template)
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
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return
    except ValueError:  # of the port
        pass
    raise UserError(f"the endpoint is {url!r}: write it as http://localhost:8000/v1")


def _template(path: Path) -> str:
    if not path.is_file():
        raise MissingFileError(f"{path}: there is no such template")
    try:
        text = path.read_text(encoding="utf-8")
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the template is not UTF-8 text") from error
    except ValueError:
        names = {""}
    known = {"category", "concept", "count", "set", "sets"}
    if not {"concept", "count"} <= names <= known:
        raise UserError(
            f"{path}: a template has {{concept}} and {{count}} in braces and may have "
            "{category}, {set} and {sets}; other braces are doubled"
        )
    return text


async def _ask_all(
    settings: Settings,
    requests: Sequence[Request],
    journal: Journal,
    progress: Callable[[str], None],
) -> dict[str, str]:
    """Asks them, several at a time; by id, why some have no answer."""
    endpoint = Endpoint(
        settings.url,
        settings.model,
        requests_per_minute=settings.requests_per_minute,
        timeout=settings.timeout,
    )
    failed: dict[str, str] = {}
    waiting = iter(requests)
    pace, done = Pace(len(requests)), 0

    async def work() -> None:
        nonlocal done
        for request in waiting:  # shared: each takes the next
            reason = await _ask(settings, endpoint, request, journal)
            if reason:
                failed[request.id] = reason
            done += 1
            if pace.due(done):
                progress(
                    f"{done}/{len(requests)} requests, {60 * pace.rate(done):.0f} a minute, "
                    f"{pace.left(done):.0f} s left; "
                    f"{endpoint.used.prompt_tokens} + {endpoint.used.answer_tokens} tokens"
                )

    workers = [asyncio.create_task(work()) for _ in range(min(settings.concurrency, len(requests)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await endpoint.close()
    return failed


async def _ask(settings: Settings, endpoint: Endpoint, request: Request, journal: Journal) -> str:
    """Asks until an answer can be used and keeps that; why there is none, or ""."""
    reason = ""
    for attempt in range(settings.attempts):
        try:
            seed = request.seed * settings.attempts + attempt
            text = await endpoint.ask(request.text, seed=seed, temperature=settings.temperature)
            pairs, faults = read_answer(text, request.count)
        except UnusableAnswerError as error:
            reason = str(error)
            if error.again:
                continue
            break
        journal.add(request.id, pairs, faults)
        return ""
    return reason
