"""Prompts that ask whether a document answers a query, as tokens: what all share, and what each has of its own."""

import string
from collections.abc import Sequence
from dataclasses import dataclass

from rap_env.errors import RankingFailed

_FIELDS = {"instruction", "query", "document"}


@dataclass(frozen=True)
class Template:
    """How a reranker is asked, and which words it answers with.

    Attributes:
        text: Holds `{query}` and, once and not at either end, `{document}`; `{instruction}` may be there too. Other
            braces are doubled.
        instruction: What makes a document relevant.
        yes: The answer for a relevant document; its first token counts.
        no: The answer for another.

    Raises:
        RankingFailed: The text has other fields, or nothing in front of the document or behind it.
    """

    text: str
    instruction: str = ""
    yes: str = "yes"
    no: str = "no"

    def __post_init__(self) -> None:
        try:
            fields = [field for _text, field, _form, _conversion in string.Formatter().parse(self.text) if field]
        except ValueError as error:
            raise RankingFailed(f"the template is no format string: {error}") from error
        if not {"query", "document"} <= set(fields) <= _FIELDS or self.text.count("{document}") != 1:
            raise RankingFailed(
                f"expected a template with {{query}}, one {{document}} and at most {{instruction}}; got {fields}"
            )
        before, behind = self.text.split("{document}")
        if not before.strip() or not behind:
            raise RankingFailed("expected text in front of the document and behind it; the template has it at one end")

    def parts(self, query: str) -> tuple[str, str, str]:
        """What stands in front of each document, the spaces between the two, and what stands behind each."""
        before, behind = self.text.split("{document}")
        front, ending = (part.format(instruction=self.instruction, query=query) for part in (before, behind))
        return front.rstrip(" "), front[len(front.rstrip(" ")) :], ending


# Of the model cards of Qwen3-Reranker (arXiv 2506.05176).
QWEN3 = Template(
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct"
    ' provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "Given a web search query, retrieve relevant passages that answer the query",
)


# Of the embedded model's adapter. The query stands behind the document, so that how likely its words are after the
# document is there to be seen.
SMOLLM2 = Template(
    "<|im_start|>user\n<Document>: {document}\n<Query>: {query}\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    "Does the document answer the query? Answer yes or no.",
)


@dataclass(frozen=True)
class Prompt:
    """The tokens of one request.

    Attributes:
        prefix: In front of all documents.
        endings: For each document its own tokens and those that follow.
    """

    prefix: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]


class Prompts:
    """Turns requests into tokens.

    What is in front of a document, the document and what is behind it become tokens each by itself; spaces in front of
    a document go with it. Special tokens are recognised everywhere, in documents too.

    Args:
        tokenizer: Of the model.
        template: How it is asked.
        max_document_tokens: A longer document is cut behind so many tokens; query and template never are.
        context_tokens: Longest sequence that the model takes.

    Attributes:
        yes: Token of the answer for relevant documents.
        no: Token of the other answer.

    Raises:
        RankingFailed: There is no room for documents, or both answers begin with the same token.
    """

    def __init__(self, tokenizer, template: Template, max_document_tokens: int, context_tokens: int) -> None:
        if max_document_tokens < 1:
            raise RankingFailed(f"expected room for at least 1 token of a document; got {max_document_tokens}")
        self._tokenizer, self._template = tokenizer, template
        self._max_document_tokens, self._context_tokens = max_document_tokens, context_tokens
        first = [tokens[:1] for tokens in self._tokens([template.yes, template.no])]
        if [] in first or first[0] == first[1]:
            raise RankingFailed(
                f"expected two words with different first tokens; got {template.yes!r}, {template.no!r}"
            )
        self.yes, self.no = (tokens[0] for tokens in first)
        opening = tokenizer("").input_ids[:1]
        self._opening = opening if opening == [tokenizer.bos_token_id] else []

    def of(self, query: str, documents: Sequence[str]) -> Prompt:
        """The tokens of a request.

        Args:
            query: What is asked for.
            documents: At least one.

        Raises:
            RankingFailed: The model's context has no room for a document beside query and template.
        """
        front, spaces, ending = self._template.parts(query)
        before, behind = self._tokens([front, ending])
        prefix = [*self._opening, *before]
        room = self._context_tokens - len(prefix) - len(behind)
        if room < 1:
            raise RankingFailed(
                f"query and template have {len(prefix) + len(behind)} tokens, the model takes {self._context_tokens}:"
                " there is no room for a document"
            )
        room = min(room, self._max_document_tokens)
        own = self._tokens([spaces + document for document in documents])
        return Prompt(tuple(prefix), tuple((*tokens[:room], *behind) for tokens in own))

    def alone(self, query: str, documents: Sequence[str]) -> list[list[int]]:
        """The tokens of the query and of each document by themselves; a long one is cut."""
        return [tokens[: self._max_document_tokens] for tokens in self._tokens([query, *documents])]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
