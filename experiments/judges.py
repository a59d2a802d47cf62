"""Who judges masks: each YAML in conf/evaluation names one of these builders of a search and a report half."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rap_env.calibration import (
    Corpus,
    consecutive_windows,
    find_overlaps,
    local_corpus,
    local_text,
    random_windows,
    refuse_contamination,
    self_generated_corpus,
)
from rap_env.errors import ContaminationFound, UnknownName
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.evaluator import Evaluator
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.perplexity import PerplexityEvaluator, TextEvaluator
from rap_env.llm.switchable import SwitchableLLM

_FITNESSES = {"loss": PerplexityEvaluator, "divergence": DivergenceEvaluator}


@dataclass(frozen=True)
class Judges:
    """Two evaluators that share no text.

    Attributes:
        search: Judges masks while agents search.
        report: Judges masks for reports.
        search_text: What the search half holds.
        reported: What the report half holds, by name.
        held_out: What calibration text must not hold, by name: the report half, and the items of search tasks.
    """

    search: Evaluator
    report: Evaluator
    search_text: Corpus
    reported: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]


def task_judges(
    tasks: Sequence[str],
    report_tasks: Sequence[str] | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    metric: str = "acc",
    batch_tokens: int = 4096,
) -> Judges:
    """Accuracy on lm-eval tasks.

    Args:
        tasks: Tasks of the search half; without report tasks their even items.
        report_tasks: Tasks of the report half; None for the odd items of `tasks`.
        include_path: Folder with further task YAMLs.
        limit: Items of each half of each task; None for all.
        metric: What the score is the mean of.
        batch_tokens: Tokens that are forwarded at once.

    Raises:
        ContaminationFound: An item that would be reported on is searched on as well.
        RapError: Whatever `HarnessEvaluator` raises.
    """
    options = {"include_path": include_path, "limit": limit, "metric": metric, "batch_tokens": batch_tokens}
    halves = [None, None] if report_tasks else ["search", "report"]
    search = HarnessEvaluator(tasks, half=halves[0], **options)
    report = HarnessEvaluator(report_tasks or tasks, half=halves[1], **options)
    searched, reported = search.item_texts, report.item_texts
    owners = {text: name for name, texts in searched.items() for text in texts}
    for name, texts in reported.items():
        for text in texts:
            if text in owners:
                raise ContaminationFound(f"{name!r} would report on an item that {owners[text]!r} searches on: {text}")
    items = tuple(text for texts in searched.values() for text in texts)
    return Judges(search, report, Corpus("search items", items), reported, searched | reported)


def text_judges(  # noqa: PLR0913 - its arguments are the keys of a YAML
    llm: SwitchableLLM,
    search_paths: Sequence[str],
    report_paths: Sequence[str],
    search_windows: tuple[int, int],
    report_windows: tuple[int, int],
    seed: int = 0,
    fitness: str = "loss",
) -> Judges:
    """Mean loss, or divergence from the dense model, on windows of local text files; perplexity on those of others.

    Args:
        llm: Its tokenizer cuts the text.
        search_paths: Text files, or folders of them, that masks are searched on.
        report_paths: Text files that masks are reported on.
        search_windows: N windows of T tokens, drawn at random.
        report_windows: The first N windows of T tokens, or as many as there are.
        seed: Seed of the drawing.
        fitness: `"loss"` or `"divergence"`: what masks are searched by.

    Raises:
        UnknownName: No such fitness.
        ContaminationFound: The search text shares 13 words in a row with a reported window.
        CorpusUnavailable: A file can't be read, or is too short.
    """
    if fitness not in _FITNESSES:
        raise UnknownName("fitness", fitness, _FITNESSES)
    search_text, report_name = local_corpus(search_paths), local_corpus(report_paths).name
    halves = _Windows(tuple(search_windows), tuple(report_windows), seed, _FITNESSES[fitness])
    return halves.judges(llm.tokenizer, search_text, local_text(report_paths), report_name)


def self_text_judges(
    llm: SwitchableLLM,
    folder: Path,
    documents: tuple[int, int],
    search_windows: tuple[int, int],
    report_windows: tuple[int, int],
    seed: int = 0,
) -> Judges:
    """The same on text that the dense model samples itself: even documents for the search, odd ones for the report.

    Models recite, so an even document that shares 13 words in a row with an odd one is left out.

    Args:
        llm: The model.
        folder: Where sampled text is stored.
        documents: N documents of T tokens are sampled.
        search_windows: N windows of T tokens, drawn at random.
        report_windows: The first N windows of T tokens, or as many as there are.
        seed: Seed of sampling and drawing.

    Raises:
        CorpusUnavailable: There are fewer tokens than the windows need.
    """
    corpus = self_generated_corpus(llm, folder, *documents, seed)
    searched, reported = corpus.documents[0::2], corpus.documents[1::2]
    repeated = {overlap.document for overlap in find_overlaps(searched, {"report": reported})}
    kept = tuple(document for index, document in enumerate(searched) if index not in repeated)
    halves = _Windows(tuple(search_windows), tuple(report_windows), seed)
    return halves.judges(llm.tokenizer, Corpus(f"{corpus.name}, even", kept), "".join(reported), "self-generated text")


@dataclass(frozen=True)
class _Windows:
    """How many windows of how many tokens are drawn for the search, and cut from the start for the report."""

    search: tuple[int, int]
    report: tuple[int, int]
    seed: int
    searcher: type[TextEvaluator] = PerplexityEvaluator

    def judges(self, tokenizer, search_text: Corpus, report_text: str, report_name: str) -> Judges:
        n_windows, tokens = self.report
        drawn = random_windows(search_text, tokenizer, *self.search, self.seed)
        first = consecutive_windows(report_text, tokenizer, tokens, n_windows)
        reported = {report_name: tokenizer.batch_decode(first)}
        refuse_contamination(search_text, reported)
        search, report = self.searcher(drawn, search_text.name), PerplexityEvaluator(first, report_name)
        return Judges(search, report, search_text, reported, reported)


def searched_corpus(search_text: Corpus) -> Corpus:
    """Calibration text for `calibration=search`: what masks are searched on."""
    return search_text
