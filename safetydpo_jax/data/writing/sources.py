"""The sources of pairs of a factory: the embedded world's grammar, or what a model has written."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetydpo_jax import storage
from safetydpo_jax.command_line import shipped
from safetydpo_jax.data.sources import PairSource, emoji_source, plain_source
from safetydpo_jax.data.writing.concepts import read_concepts
from safetydpo_jax.data.writing.run import REPORT, write_prompts
from safetydpo_jax.data.writing.settings import Settings, about, estimate, said
from safetydpo_jax.emoji.own_harm import listed
from safetydpo_jax.errors import UserError
from safetydpo_jax.harm import read_harm

GRAMMAR = "grammar"  # the writer that is no model
# They have a meaning as a name or a folder.
_TAKEN = ("all", "safe", "own", "pairs", "prompts", "cache")


class Writer:
    """Has prompts written about the concepts of a config, or has them ready.

    Attributes:
      categories: of the concepts, in the order of their list.
      name: says who writes, in a few words.

    Args:
      config: `base`; `writer`, as configs/coprov2.py has it.
      out: the folder for what a model writes.

    Raises:
      MissingFileError, UserError: a wrong setting, or list of concepts.
    """

    def __init__(self, config: Any, out: Path):
        writer = config.writer
        if not writer.concepts or not writer.model:
            raise UserError(
                "give the list of unsafe concepts as --config.writer.concepts=FILE, a table with "
                "the columns category,concept, and who is to write about them as "
                "--config.writer.model=NAME, with --config.writer.endpoint=URL or of transformers: "
                "docs/pairs/factory.md"
            )
        self._out = out
        self._harms, self._settings, self.name = {}, None, writer.model
        path = shipped(writer.concepts)
        concepts = read_concepts(path)
        self.categories = list(dict.fromkeys(concept.category for concept in concepts))
        if wrong := [name for name in self.categories if name.lower() in _TAKEN]:
            raise UserError(f"{path}: the name {wrong[0]} is taken: call the category otherwise")
        if (writer.model == GRAMMAR) != (config.base == "emoji"):
            raise UserError(
                f"config.writer.model is {writer.model}, but the embedded world has prompts of its "
                f"own, of pictograms, and other models have none: {GRAMMAR} is for emoji alone"
            )
        if writer.model == GRAMMAR:
            rows = ((concept.where, concept.category, concept.text) for concept in concepts)
            self._harms = {harm.name: harm for harm in listed(rows)}
            return
        given: dict[str, Any] = writer.to_dict()
        for key in ("concepts", "endpoint", "model"):
            del given[key]
        for key in ("template", "judge_template"):  # "" is the one that is shipped
            file = given.pop(key)
            given |= {key: Path(file)} if file else {}
        self._settings = Settings(path, out, writer.endpoint, writer.model, **given)
        self.name = f"{writer.model}, {said(self._settings, estimate(self._settings))}"

    def write(
        self, wanted: Mapping[str, int], progress: Callable[[str], None]
    ) -> dict[str, tuple[str, PairSource]]:
        """By category, the harm's file ("" if it is a built-in one) and the source.

        What was written once is not asked for again, nor is what had no answer: pictures may have
        been drawn of it. One of several processes writes, the others wait for it.

        Args:
          wanted: pairs of each category; if there are fewer prompts, it is told.
          progress: takes lines of text.

        Raises:
          UserError: as `write_prompts`.
        """
        if not self._settings:
            progress(f"prompts: of pictograms, {len(self._harms)} categories")
            return {name: ("", emoji_source(harm)) for name, harm in self._harms.items()}
        waiting = lambda: progress("prompts: another process is writing them")  # noqa: E731
        with storage.held(self._out / ".lock", waiting):
            report = self._written() or write_prompts(self._settings, progress)
        counts = {name: count["kept"] for name, count in report["categories"].items()}
        for name, count in counts.items():
            often = f": each is drawn {wanted[name] / count:.1f} times" if count else ": none"
            progress(
                f"prompts: {name}, {count} for {wanted[name]} pairs"
                + (often if count < wanted[name] else "")
            )
        if unanswered := len(report["unanswered_ids"]):
            progress(f"prompts: {unanswered} requests have no answer; {self._out / REPORT}")
        paths = {name: str(self._out / name) for name, count in counts.items() if count}
        return {name: (path, plain_source(read_harm(path))) for name, path in paths.items()}

    def about(self) -> dict[str, Any]:
        """Who wrote, how, and what was left out; JSON."""
        if not self._settings:
            concepts = {name: len(harm.concepts) for name, harm in self._harms.items()}
            return {"model": GRAMMAR, "concepts": concepts}
        report = self._written() or {}
        shown = {k: report[k] for k in ("settings", "categories", "left_out") if k in report}
        if not self._settings.url:  # of a folder, what is no secret
            shown["settings"] |= {"model": Path(self._settings.model).name}
        return shown

    def _written(self) -> dict[str, Any] | None:
        """The report of an earlier call that came by prompts."""
        assert self._settings
        path = self._out / REPORT
        if not path.is_file():
            return None
        try:
            report = json.loads(path.read_bytes())
            before = dict(report["settings"])
            kept = sum(count["kept"] for count in report["categories"].values())
            len(report["unanswered_ids"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error!r}): remove it") from error
        if not kept:
            return None
        remedy = "or choose another --workdir"
        storage.check_same(self._out, before, about(self._settings), remedy)
        return report
