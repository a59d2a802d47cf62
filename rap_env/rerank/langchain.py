"""A reranker as a document compressor of LangChain, for who has `langchain-core`; nothing else imports this file."""

from collections.abc import Sequence
from typing import Any

from langchain_core.documents import BaseDocumentCompressor, Document


class RerankerCompressor(BaseDocumentCompressor):
    """Keeps the documents that answer a query best, the best first, with `relevance_score` in their metadata.

    Attributes:
        reranker: `Reranker`, or anything with its `rank`.
        top_k: How many documents are kept; None for all.
    """

    reranker: Any
    top_k: int | None = None

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Any = None
    ) -> Sequence[Document]:
        """See `BaseDocumentCompressor.compress_documents`."""
        best = self.reranker.rank(query, [each.page_content for each in documents], self.top_k)
        return [_scored(documents[each["corpus_id"]], each["score"]) for each in best]


def _scored(document: Document, score: float) -> Document:
    """A copy, since a retriever may hand out the same document again."""
    return document.model_copy(update={"metadata": {**document.metadata, "relevance_score": score}})
