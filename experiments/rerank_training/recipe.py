"""From a collection to an adapter and a record: what `scripts/train_reranker.py` runs."""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from experiments.progress import phase
from experiments.records import model_provenance, provenance
from experiments.rerank_training.data import Collection, load_collection, split_queries
from experiments.rerank_training.evaluation import best_weight, compared, compared_sums
from experiments.rerank_training.lists import ListSettings, TrainingLists
from experiments.rerank_training.rivals import Bm25, Scores, encoder_scores, fused
from experiments.rerank_training.scoring import ListScorer
from experiments.rerank_training.training import Trainer, TrainingSettings, load_adapter, save_adapter, with_adapter
from rap_env.llm.loading import load_llm
from rap_env.rerank.prompts import SMOLLM2

_FILES = ("corpus.jsonl", "queries.jsonl", "qrels.tsv")
_LIBRARIES = ("bm25s", "ir_measures", "peft")


@dataclass(frozen=True)
class Recipe:
    """What is learned, and what is reported.

    Attributes:
        training: How the adapter is learned.
        lists: What it is learned from.
        model: What `load_llm` takes.
        dtype: Likewise.
        validation_queries: Queries that settings and weights of fused scores are chosen on.
        report_queries: Queries that nothing is chosen on.
        split_seed: Of the shuffle.
        candidates: How many of BM25's best documents are reranked.
        scored_tokens: Where documents are cut that are reranked.
        report: `report`, or `validation` to compare settings.
        plain_model: Whether the model without an adapter is scored too, by its answer and by likelihoods.
    """

    training: TrainingSettings
    lists: ListSettings
    model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    validation_queries: int = 20
    report_queries: int = 50
    split_seed: int = 0
    candidates: int = 50
    scored_tokens: int = 256
    report: str = "report"
    plain_model: bool = True


class Run:
    """A recipe over a collection.

    Args:
        recipe: What is learned, and what is reported.
        data: The collection's folder.
        start: Folder of an adapter that training starts with; None starts with one that changes nothing.

    Attributes:
        recipe: The same, with the start's digest.
        split: Which queries are for what.
    """

    def __init__(self, recipe: Recipe, data: Path, start: Path | None = None) -> None:
        self._collection = load_collection(data)
        self._digests = {name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in _FILES}
        self._data_name = data.resolve().name
        names = list(self._collection.queries)
        self.split = split_queries(names, recipe.validation_queries, recipe.report_queries, recipe.split_seed)
        self._texts = {name: document.text for name, document in self._collection.documents.items()}
        self._bm25 = Bm25(self._texts)
        self._llm = load_llm(recipe.model, recipe.dtype)
        self._base_provenance = model_provenance(self._llm, self._digests["corpus.jsonl"])
        self._adapted = with_adapter(self._llm, recipe.training)
        if start is not None:
            digest = load_adapter(self._adapted, start)
            recipe = replace(recipe, training=replace(recipe.training, start_digest=digest))
        self.recipe = recipe
        learnable = only_queries(self._collection, self.split.training)
        lists = TrainingLists(learnable, recipe.lists, self._bm25)
        self._trainer = Trainer(self._llm, self._adapted, lists, recipe.training)

    def train(self, checkpoint: Path, minutes: float) -> bool:
        """Trains, or goes on, until all steps are done or the time is up; returns whether they are done."""
        with phase("training") as progress:
            return self._trainer.train(checkpoint, minutes, every=10, progress=progress)

    def save_adapter(self, folder: Path) -> None:
        """Writes what was learned, for `peft`."""
        save_adapter(self._adapted, folder)

    def results(self) -> dict:
        """The table, over the queries that the recipe reports, and what training came to."""
        validation, report = self.split.validation, getattr(self.split, self.recipe.report)
        runs = {"bm25": self._candidates(report)}
        runs["sentence_encoder"] = self._encoder_scores(runs["bm25"])
        for name in ("untuned", "likelihood") if self.recipe.plain_model else ():
            runs[name] = self._model_scores(name, runs["bm25"], tuned=False)
        runs["tuned"] = self._model_scores("tuned", runs["bm25"])
        chosen_on = runs.copy()
        if report != validation:
            chosen_on = {"bm25": self._candidates(validation)}
            chosen_on["tuned"] = self._model_scores("validation", chosen_on["bm25"])
            chosen_on["sentence_encoder"] = self._encoder_scores(chosen_on["bm25"])
        weights = {}
        for first, second in (("bm25", "tuned"), ("bm25", "sentence_encoder"), ("sentence_encoder", "tuned")):
            name = f"{first} + {second}"
            weights[name] = best_weight(self._collection.grades, chosen_on[first], chosen_on[second])
            runs[name] = {query: fused(runs[first][query], runs[second][query], weights[name]) for query in runs[first]}
        return {
            "systems": compared(self._collection.grades, runs, "bm25"),
            "validation": compared(self._collection.grades, chosen_on, "bm25"),
            "weights_of_the_second": weights,
            "reported": self.recipe.report,
            "split": asdict(self.split),
            "training": {
                "steps": self._trainer.step,
                "seconds": self._trainer.seconds,
                "tokens": self._trainer.tokens,
                "losses": self._trainer.losses,
            },
        }

    def teachers(self) -> dict:
        """What may be learned from: sums of three signals, over the queries to learn from and to choose on."""
        runs = {"bm25": self._candidates((*self.split.training, *self.split.validation))}
        runs["likelihood"] = self._model_scores("likelihood", runs["bm25"], tuned=False)
        runs["encoder"] = self._encoder_scores(runs["bm25"])
        return {"queries": len(runs["bm25"]), "sums": compared_sums(self._collection.grades, runs, "likelihood")}

    def record(self, results: Mapping) -> dict:
        """The record of these results."""
        found = provenance() | self._base_provenance
        found["versions"] = found["versions"] | {name: version(name) for name in _LIBRARIES}
        config = asdict(self.recipe) | {"data": self._data_name, "data_digests": self._digests}
        return {"config": config, "provenance": found, "results": dict(results)}

    def _candidates(self, queries: Sequence[str]) -> dict[str, Scores]:
        return {name: self._bm25.best(self._collection.queries[name], self.recipe.candidates) for name in queries}

    def _encoder_scores(self, candidates: Mapping[str, Scores]) -> dict[str, Scores]:
        queries = {name: self._collection.queries[name] for name in candidates}
        return encoder_scores(queries, candidates, self._texts)

    def _model_scores(self, name: str, candidates: Mapping[str, Scores], tuned: bool = True) -> dict[str, Scores]:
        found = {}
        with contextlib.nullcontext() if tuned else self._adapted.disable_adapter(), phase(name) as progress:
            scorer = ListScorer(self._llm.model, self._llm.tokenizer, SMOLLM2, self.recipe.scored_tokens)
            for number, (query, documents) in enumerate(candidates.items(), 1):
                texts = [self._texts[document] for document in documents]
                scores = scorer.rank(self._collection.queries[query], texts, by_likelihood=name == "likelihood")
                found[query] = dict(zip(documents, scores, strict=True))
                progress(number, len(candidates))
        return found


def only_queries(collection: Collection, queries: Sequence[str]) -> Collection:
    """The collection as if it had no other queries, so that nothing can be learned from them."""
    return Collection(
        collection.documents,
        {name: collection.queries[name] for name in queries},
        {name: collection.grades[name] for name in queries},
    )
