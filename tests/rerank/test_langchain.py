"""The reranker in LangChain's form."""

import pytest

pytest.importorskip("langchain_core", reason="optional")


class LongestFirst:
    def rank(self, query, documents, top_k):
        order = sorted(range(len(documents)), key=lambda number: -len(documents[number]))
        return [{"corpus_id": number, "score": float(len(documents[number]))} for number in order[:top_k]]


def test_the_best_documents_come_back_as_copies_with_their_scores():
    from langchain_core.documents import Document

    from rap_env.rerank.langchain import RerankerCompressor

    documents = [Document("a", metadata={"source": 1}), Document("ccc"), Document("bb", id="two")]
    found = RerankerCompressor(reranker=LongestFirst(), top_k=2).compress_documents(documents, "query")
    assert [each.page_content for each in found] == ["ccc", "bb"] and found[1].id == "two"
    assert found[0].metadata == {"relevance_score": 3.0} and documents[1].metadata == {}
