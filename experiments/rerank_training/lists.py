"""What is learned from: a query, a few documents, and how much of the choice each of them should get."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.rerank_training.data import Collection
from experiments.rerank_training.pseudo import pseudo_queries
from experiments.rerank_training.rivals import Bm25, SentenceEncoder, fused


@dataclass(frozen=True)
class ListSettings:
    """How lists are drawn.

    Attributes:
        documents: Documents of a list.
        pool: How many of BM25's best hard negatives come from.
        random_documents: Of a list with labels, how many come from the whole corpus.
        label_share: Share of the lists whose query is a training query with labels; the others' are made from text.
        encoder_weight: Of the sentence encoder in the scores that lists without labels are to learn, beside BM25.
        temperature: That these scores, standardised over the pool, are divided by.
        seed: Of what is drawn.
    """

    documents: int = 6
    pool: int = 30
    random_documents: int = 1
    label_share: float = 0.5
    encoder_weight: float = 0.5
    temperature: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class TrainingList:
    """A query and documents with targets that add up to 1.

    Attributes:
        source: `label`, `title` or `sentence`.
        query: Its text.
        names: Of the documents.
        texts: Of the documents.
        targets: Of the softmax over the documents' scores.
    """

    source: str
    query: str
    names: tuple[str, ...]
    texts: tuple[str, ...]
    targets: tuple[float, ...]


class TrainingLists:
    """Lists by number: the same number gives the same list, whatever was drawn before.

    Args:
        collection: Documents, and no other queries than those to learn from.
        settings: How lists are drawn.
        bm25: Over these documents.
        encoder: Over these documents; None where no list is made from text.

    Attributes:
        settings: The same.
    """

    def __init__(
        self, collection: Collection, settings: ListSettings, bm25: Bm25, encoder: SentenceEncoder | None
    ) -> None:
        self._collection, self.settings = collection, settings
        self._texts = {name: document.text for name, document in collection.documents.items()}
        self._filled = [name for name, text in self._texts.items() if text]
        self._queries = list(collection.queries)
        self._pools = [list(bm25.best(text, settings.pool)) for text in collection.queries.values()]
        self._pseudo, self._pseudo_scores = [], []
        if encoder is not None:
            self._pseudo = pseudo_queries(collection.documents, settings.seed)
            found = [bm25.best(each.text, settings.pool) for each in self._pseudo]
            cosines = encoder.score([each.text for each in self._pseudo], found)
            self._pseudo_scores = [fused(*pair, settings.encoder_weight) for pair in zip(found, cosines, strict=True)]

    def __getitem__(self, number: int) -> TrainingList:
        """The list of that number."""
        rng = np.random.default_rng([self.settings.seed, 2, number])
        if self._pseudo and rng.random() >= self.settings.label_share:
            return self._without_labels(rng)
        return self._with_labels(rng)

    def _with_labels(self, rng: np.random.Generator) -> TrainingList:
        """One relevant document, and others that nobody judged relevant to the query."""
        index = int(rng.integers(len(self._queries)))
        query, settings = self._queries[index], self.settings
        relevant = [name for name, grade in self._collection.grades[query].items() if grade > 0 and self._texts[name]]
        positive = relevant[rng.integers(len(relevant))]
        hard = [name for name in self._pools[index] if name not in relevant]
        n_hard = min(settings.documents - 1 - settings.random_documents, len(hard))
        negatives = [hard[choice] for choice in rng.permutation(len(hard))[:n_hard]]
        names = self._filled_up([positive, *negatives], excluded=relevant, rng=rng)
        targets = (1.0, *(0.0 for _negative in names[1:]))
        texts = tuple(self._texts[name] for name in names)
        return TrainingList("label", self._collection.queries[query], tuple(names), texts, targets)

    def _without_labels(self, rng: np.random.Generator) -> TrainingList:
        """A text's own document without that text, and BM25's best others; targets from both rivals' scores."""
        index = int(rng.integers(len(self._pseudo)))
        pseudo, scores = self._pseudo[index], self._pseudo_scores[index]
        others = [name for name in scores if name != pseudo.source]
        chosen = [others[choice] for choice in rng.permutation(len(others))[: self.settings.documents - 1]]
        names = self._filled_up([pseudo.source, *chosen], excluded=(), rng=rng)
        lowest, highest = min(scores.values()), max(scores.values())
        aims = [scores.get(pseudo.source, highest), *(scores.get(name, lowest) for name in names[1:])]
        texts = (pseudo.rest, *(self._untitled(pseudo.kind, name) for name in names[1:]))
        return TrainingList(
            pseudo.kind, pseudo.text, tuple(names), texts, _softmax(np.array(aims) / self.settings.temperature)
        )

    def _untitled(self, kind: str, name: str) -> str:
        """A document as those beside a title's own document are shown: without its title, as that one is."""
        document = self._collection.documents[name]
        return document.body if kind == "title" and document.body else document.text

    def _filled_up(self, names: list[str], excluded: Sequence[str], rng: np.random.Generator) -> list[str]:
        """Names, then documents from the whole corpus until the list is complete."""
        left = [name for name in self._filled if name not in names and name not in excluded]
        missing = self.settings.documents - len(names)
        return names + [left[choice] for choice in rng.permutation(len(left))[:missing]]


def _softmax(values: np.ndarray) -> tuple[float, ...]:
    powers = np.exp(values - values.max())
    return tuple((powers / powers.sum()).tolist())
