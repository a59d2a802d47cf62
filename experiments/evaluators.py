"""What scores masks: each YAML in conf/evaluation names one of these builders of a search half and a report half."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rap_env.calibration import (
    Corpus,
    consecutive_windows,
    count_unchecked,
    find_overlaps,
    local_corpus,
    local_text,
    normalised,
    packaged_corpus,
    random_windows,
    refuse_contamination,
)
from rap_env.errors import ContaminationFound, UnknownName
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.evaluator import Evaluator
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.perplexity import PerplexityEvaluator, cut_contexts
from rap_env.evaluation.table import TableModel
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.windows import check_windows

_FITNESSES = {"loss": PerplexityEvaluator, "divergence": DivergenceEvaluator}


@dataclass(frozen=True)
class Halves:
    """Two evaluators that share no text.

    Attributes:
        search: Evaluates masks while agents search.
        report: Evaluates masks for reports.
        search_text: What the search half holds; calibration text may be cut from it.
        reported: What the report half holds, by name.
        held_out: What calibration text must not hold, by name: the report half, and the items of search tasks.
        repeated_items: Items that the search half leaves out, because the report half has them as well.
        also_searched: Whatever else the search half holds.
    """

    search: Evaluator
    report: Evaluator
    search_text: Corpus
    reported: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]
    repeated_items: int = 0
    also_searched: tuple[Corpus, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """For records: repeated items that were left out, and held-out ones that are too short to be checked."""
        return {"repeated_items": self.repeated_items, "unchecked_items": count_unchecked(self.held_out)}


def task_halves(  # noqa: PLR0913 - its arguments are the keys of a YAML
    tasks: Sequence[str],
    report_tasks: Sequence[str] | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    metric: str = "acc",
    batch_tokens: int = 4096,
    fitness: str | None = None,
) -> Halves:
    """Accuracy on lm-eval tasks.

    Benchmarks repeat rows: the report keeps an item that both halves have, the search leaves it out.

    Args:
        tasks: Tasks of the search half; without report tasks their even items.
        report_tasks: Tasks of the report half; None for the odd items of `tasks`.
        include_path: Folder with further task YAMLs; `~` is the home folder.
        limit: Items of each half of each task, repeated ones among them; None for all.
        metric: What the score is the mean of.
        batch_tokens: Tokens that are forwarded at once.
        fitness: The metric that masks are searched by; None for the same.

    Raises:
        ContaminationFound: All items of a search task would be reported on as well.
        RapError: Whatever `HarnessEvaluator` raises.
    """
    folder = None if include_path is None else os.path.expanduser(include_path)
    options = {"include_path": folder, "limit": limit, "batch_tokens": batch_tokens}
    search_half, report_half = (None, None) if report_tasks else ("search", "report")
    search = HarnessEvaluator(tasks, half=search_half, metric=fitness or metric, **options)
    report = HarnessEvaluator(report_tasks or tasks, half=report_half, metric=metric, **options)
    repeated = _repeated_items(search.item_texts, report.item_texts)
    if repeated:
        search = search.without(repeated)
    searched, reported = search.item_texts, report.item_texts
    held_out = {f"{name} (search half)": texts for name, texts in searched.items()}
    held_out |= {f"{name} (report half)": texts for name, texts in reported.items()}
    search_text = Corpus("search items", tuple(text for texts in searched.values() for text in texts))
    return Halves(search, report, search_text, reported, held_out, len(repeated))


def _repeated_items(searched: Mapping[str, Sequence[str]], reported: Mapping[str, Sequence[str]]) -> list[str]:
    """Search items that are reported on as well, whatever their spacing, case and Unicode form."""
    known = {normalised(text) for texts in reported.values() for text in texts}
    repeated: list[str] = []
    for name, texts in searched.items():
        found = [text for text in texts if normalised(text) in known]
        if len(found) == len(texts):
            raise ContaminationFound(
                f"all {len(texts)} items that {name!r} would be searched on are reported on as well"
            )
        repeated += found
    return repeated


def text_halves(  # noqa: PLR0913 - its arguments are the keys of a YAML
    llm: SwitchableLLM,
    search_paths: Sequence[str],
    report_paths: Sequence[str],
    search_windows: tuple[int, int],
    report_windows: tuple[int, int],
    seed: int = 0,
    fitness: str = "loss",
) -> Halves:
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
        InvalidWorkload: No window, or windows of one token, or beyond the model's context.
    """
    report_text = Corpus(local_corpus(report_paths).name, (local_text(report_paths),))
    return _text_halves(llm, local_corpus(search_paths), report_text, (search_windows, report_windows), seed, fitness)


def packaged_text_halves(
    llm: SwitchableLLM,
    search_windows: tuple[int, int],
    report_windows: tuple[int, int],
    seed: int = 0,
    fitness: str = "loss",
) -> Halves:
    """The same on text that ships with this package: even documents for the search, odd ones for the report."""
    corpus = packaged_corpus("evaluation")
    even, odd = (Corpus(f"{corpus.name}, {half}", corpus.documents[i::2]) for i, half in enumerate(("even", "odd")))
    return _text_halves(llm, even, odd, (search_windows, report_windows), seed, fitness)


def _text_halves(
    llm: SwitchableLLM,
    search_text: Corpus,
    report_text: Corpus,
    windows: tuple[tuple[int, int], tuple[int, int]],
    seed: int,
    fitness: str,
) -> Halves:
    if fitness not in _FITNESSES:
        raise UnknownName("fitness", fitness, _FITNESSES)
    for each in windows:
        check_windows(*each, llm.shape.context_tokens)
    search_windows, (n_windows, tokens) = windows
    drawn = random_windows(search_text, llm.tokenizer, *search_windows, seed)
    first = consecutive_windows("".join(report_text.documents), llm.tokenizer, tokens, n_windows)
    reported = {report_text.name: llm.tokenizer.batch_decode(first)}
    refuse_contamination(search_text, reported)
    search = _FITNESSES[fitness](drawn, search_text.name)
    report = PerplexityEvaluator(first, report_text.name)
    return Halves(search, report, search_text, reported, reported)


def halves_at_length(  # noqa: PLR0913 - its arguments are the keys of a YAML
    llm: SwitchableLLM,
    corpora: tuple[Corpus, Corpus],
    context_tokens: int,
    target_tokens: int,
    longest_tokens: int,
    search_windows: int,
    report_windows: int,
    seed: int = 0,
    fitness: str = "loss",
) -> Halves:
    """The same target tokens of a kind of text, read with a context of any length in front of them.

    Args:
        llm: Its tokenizer cuts the text.
        corpora: A kind of text (`rap_env.calibration.kinds`): to search on, to report on.
        context_tokens: What is read in front of the targets.
        target_tokens: The tokens that are scored.
        longest_tokens: The longest context: runs that have it in common score the same tokens.
        search_windows: How often targets with their context are drawn from the text to search on.
        report_windows: The same of the text to report on, whatever the seed.
        seed: Seed of the search's draw.
        fitness: `"loss"` or `"divergence"`: what masks are searched by; the report is the loss.

    Raises:
        UnknownName: No such fitness.
        CorpusUnavailable: A corpus is too short, or all documents to search on are reported on as well.
        InvalidWorkload: No window, no context or target, or more than the longest context or the model's.
    """
    if fitness not in _FITNESSES:
        raise UnknownName("fitness", fitness, _FITNESSES)
    tokens = longest_tokens + target_tokens
    for n_windows in (search_windows, report_windows):
        check_windows(n_windows, tokens, llm.shape.context_tokens)
    report_text = corpora[1]
    report = random_windows(report_text, llm.tokenizer, report_windows, tokens, seed=0)
    reported = {report_text.name: llm.tokenizer.batch_decode(report)}
    search_text = without_overlaps(corpora[0], reported)
    search = random_windows(search_text, llm.tokenizer, search_windows, tokens, seed)
    size = context_tokens, target_tokens
    return Halves(
        _FITNESSES[fitness](cut_contexts(search, *size), search_text.name, target_tokens),
        PerplexityEvaluator(cut_contexts(report, *size), report_text.name, target_tokens),
        *(search_text, reported, reported),
    )


def without_overlaps(corpus: Corpus, reported: Mapping[str, Sequence[str]]) -> Corpus:
    """The documents that share no 13 words in a row with reported text: modules of code begin alike.

    Raises:
        CorpusUnavailable: None is left.
    """
    shared = {overlap.document for overlap in find_overlaps(corpus.documents, reported)}
    return Corpus(corpus.name, tuple(text for number, text in enumerate(corpus.documents) if number not in shared))


def table_halves(llm: TableModel) -> Halves:
    """What a table of finished evaluations knows, for both halves: it has no text that was only reported on."""
    return Halves(llm.evaluator, llm.evaluator, Corpus(llm.evaluator.name, ("none",)), {}, {})


def table_windows(corpus: Corpus, tokenizer: None, n_windows: int, n_tokens: int, seed: int) -> torch.Tensor:
    """Windows [N, T] for `calibration=table`: only their size counts, for a table looks at no tokens."""
    return torch.zeros((n_windows, n_tokens), dtype=torch.long)


def searched_corpus(search_text: Callable[[], Corpus]) -> Corpus:
    """Calibration text for `calibration=search`: what masks are searched on."""
    return search_text()
