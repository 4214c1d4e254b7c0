"""The run: every request that is not answered yet, several at a time; then the tables."""

import asyncio
import collections
import json
from collections.abc import Callable, Sequence
from typing import Any

from safetydpo_jax import storage
from safetydpo_jax.data.writing import judge
from safetydpo_jax.data.writing.answers import PromptPair, UnusableAnswerError, read_answer
from safetydpo_jax.data.writing.concepts import read_concepts
from safetydpo_jax.data.writing.endpoint import Endpoint
from safetydpo_jax.data.writing.journal import Journal
from safetydpo_jax.data.writing.local_model import LocalModel
from safetydpo_jax.data.writing.packages import needed
from safetydpo_jax.data.writing.settings import (
    Request,
    Settings,
    about,
    judge_template,
    requests_for,
)
from safetydpo_jax.data.writing.tables import write_tables
from safetydpo_jax.errors import UserError
from safetydpo_jax.pace import Pace

REPORT = "report.json"


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
    needed("datasketch")  # by the tables, in the end: now, not after hours
    concepts = read_concepts(settings.concepts)
    requests = requests_for(settings, concepts)
    depends = about(settings)
    journal = Journal(settings.out / "journal.jsonl", depends)
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
    faults, left_out = collections.Counter(), collections.Counter()
    for request in requests:
        if answer := journal.answers.get(request.id):
            pairs[request.concept.id] += [PromptPair(*pair) for pair in answer["pairs"]]
            faults.update(answer["faults"])
            left_out[request.concept.category] += len(answer["faults"])
    counts = write_tables(settings.out, concepts, pairs, settings.per_category)
    for name, count in counts.items():
        count["written"] += left_out[name]
        count["left_out"] = left_out[name]
    report = {
        "settings": depends,
        "categories": counts,
        "left_out": dict(faults.most_common()),
        "requests": len(requests),
        "unanswered": dict(collections.Counter(failed.values()).most_common()),
        "unanswered_ids": failed,
    }
    text = json.dumps(report, indent=2) + "\n"
    with storage.explained_writes(settings.out):
        storage.write_file(settings.out / REPORT, text.encode())
    if not any(count["kept"] for count in counts.values()):
        raise UserError(f"no pair could be used: {settings.out / 'report.json'} says why")
    return report


async def _ask_all(
    settings: Settings,
    requests: Sequence[Request],
    journal: Journal,
    progress: Callable[[str], None],
) -> dict[str, str]:
    """Asks them, several at a time; by id, why some have no answer."""
    model = (
        Endpoint(
            settings.url,
            settings.model,
            requests_per_minute=settings.requests_per_minute,
            timeout=settings.timeout,
            answered=bool(journal.answers),
        )
        if settings.url
        else LocalModel(settings.model)
    )
    failed: dict[str, str] = {}
    verdicts = judge_template(settings) if settings.judge else ""
    waiting = iter(requests)
    pace, done = Pace(len(requests)), 0

    async def work() -> None:
        nonlocal done
        for request in waiting:  # shared: each takes the next
            reason = await _ask(settings, model, request, verdicts, journal)
            if reason:
                failed[request.id] = reason
            done += 1
            if pace.due(done):
                progress(
                    f"{done}/{len(requests)} requests, {60 * pace.rate(done):.0f} a minute, "
                    f"{pace.left(done):.0f} s left; "
                    f"{model.used.prompt_tokens} + {model.used.answer_tokens} tokens"
                )

    workers = [asyncio.create_task(work()) for _ in range(min(settings.concurrency, len(requests)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await model.close()
    return failed


async def _ask(
    settings: Settings,
    model: Endpoint | LocalModel,
    request: Request,
    verdicts: str,
    journal: Journal,
) -> str:
    """Asks until an answer can be used, has it judged and keeps it; why there is none, or ""."""
    try:
        pairs, faults = await _usable(
            settings, model, request, request.text, lambda text: read_answer(text, request.count)
        )
        if verdicts:
            category, seed = request.concept.category, request.seed
            text = judge.question(verdicts, category, pairs, seed)
            written = pairs
            pairs, wrong = await _usable(
                settings, model, request, text, lambda x: judge.read_verdicts(x, written, seed)
            )
            faults = [*faults, *wrong]
    except UnusableAnswerError as error:
        return str(error)
    journal.add(request.id, pairs, faults)
    return ""


async def _usable(
    settings: Settings,
    model: Endpoint | LocalModel,
    request: Request,
    question: str,
    read: Callable[[str], tuple[list[PromptPair], list[str]]],
) -> tuple[list[PromptPair], list[str]]:
    """What `read` makes of an answer, the question being asked `attempts` times at most.

    Raises:
      UnusableAnswerError: no answer could be used.
    """
    last = None
    for attempt in range(settings.attempts):
        seed = request.seed * settings.attempts + attempt
        try:
            return read(await model.ask(question, seed=seed, temperature=settings.temperature))
        except UnusableAnswerError as error:
            if not error.again:
                raise
            last = error
    assert last
    raise last
