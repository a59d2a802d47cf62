"""What is learned from: a query, and one document that it asks for among others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.rerank_training.data import Collection
from experiments.rerank_training.pseudo import pseudo_queries
from experiments.rerank_training.rivals import Bm25


@dataclass(frozen=True)
class ListSettings:
    """How lists are drawn.

    Attributes:
        documents: Documents of a list.
        random_documents: How many of them come from the whole corpus; the other negatives are among BM25's best.
        pool: How many of BM25's best these are.
        label_share: Share of the lists whose query is a training query with labels; the others' are made from text.
        seed: Of what is drawn.
    """

    documents: int = 8
    random_documents: int = 3
    pool: int = 30
    label_share: float = 0.4
    seed: int = 0


@dataclass(frozen=True)
class TrainingList:
    """A query, and documents of which the first is the one to choose.

    Attributes:
        source: `label`, `title` or `sentence`.
        query: Its text.
        names: Of the documents.
        texts: Of the documents.
    """

    source: str
    query: str
    names: tuple[str, ...]
    texts: tuple[str, ...]


class TrainingLists:
    """Lists by number: the same number gives the same list, whatever was drawn before.

    Args:
        collection: Documents, and no other queries than those to learn from.
        settings: How lists are drawn.
        bm25: Over these documents.

    Attributes:
        settings: The same.
        bm25: Likewise.
    """

    def __init__(self, collection: Collection, settings: ListSettings, bm25: Bm25) -> None:
        self._collection, self.settings, self.bm25 = collection, settings, bm25
        self._texts = {name: document.text for name, document in collection.documents.items() if document.text}
        self._queries = list(collection.queries)
        self._pseudo = pseudo_queries(collection.documents, settings.seed)

    def __getitem__(self, number: int) -> TrainingList:
        """The list of that number."""
        rng = np.random.default_rng([self.settings.seed, 2, number])
        if self._pseudo and rng.random() >= self.settings.label_share:
            return self._without_labels(rng)
        return self._with_labels(rng)

    def _with_labels(self, rng: np.random.Generator) -> TrainingList:
        """One relevant document, and others that nobody judged relevant to the query."""
        name = self._queries[rng.integers(len(self._queries))]
        query, grades = self._collection.queries[name], self._collection.grades[name]
        relevant = [document for document, grade in grades.items() if grade > 0 and document in self._texts]
        chosen = relevant[rng.integers(len(relevant))]
        names = [chosen, *self._negatives(query, relevant, rng)]
        return TrainingList("label", query, tuple(names), tuple(self._texts[each] for each in names))

    def _without_labels(self, rng: np.random.Generator) -> TrainingList:
        """A text's own document without that text; beside a title's, other documents show no title either."""
        pseudo = self._pseudo[rng.integers(len(self._pseudo))]
        negatives = self._negatives(pseudo.text, [pseudo.source], rng)
        documents = [self._collection.documents[name] for name in negatives]
        others = [each.body if pseudo.kind == "title" and each.body else each.text for each in documents]
        return TrainingList(pseudo.kind, pseudo.text, (pseudo.source, *negatives), (pseudo.rest, *others))

    def _negatives(self, query: str, excluded: Sequence[str], rng: np.random.Generator) -> list[str]:
        """Of BM25's best as many as there should be, the rest from the whole corpus."""
        n_negatives = self.settings.documents - 1
        best = [name for name in self.bm25.best(query, self.settings.pool) if name not in excluded]
        hard = _drawn(best, n_negatives - self.settings.random_documents, rng)
        left = [name for name in self._texts if name not in hard and name not in excluded]
        return hard + _drawn(left, n_negatives - len(hard), rng)


def _drawn(names: Sequence[str], n_names: int, rng: np.random.Generator) -> list[str]:
    return [names[choice] for choice in rng.permutation(len(names))[:n_names]]
