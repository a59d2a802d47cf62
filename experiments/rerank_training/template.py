"""The prompt that asks a causal LM whether a document answers a query, and the two answers that are compared."""

from collections.abc import Sequence

_BEFORE_QUERY = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct"
    ' provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: Find passages that answer the query\n<Query>:"
)
_BEFORE_DOCUMENT = "\n<Document>:"
_AFTER_DOCUMENT = "<|im_end|>\n<|im_start|>assistant\n"


def prompt_tokens(tokenizer, query: str, document: str, max_document_tokens: int) -> list[int]:
    """The tokens of a whole prompt; a document's score is logit(yes) - logit(no) at the last of them.

    Four pieces are tokenised apart from one another, without special tokens of the tokenizer's own, and laid end to
    end, so that all documents of a query share their first tokens whatever they begin with:

    1. the system message, the instruction and `<Query>:`
    2. a space and the query, its white space collapsed, then a line break and `<Document>:`
    3. a space and the document, its white space collapsed, of which the first `max_document_tokens` tokens stay
    4. the end of the user's message and the start of the assistant's

    Args:
        tokenizer: The model's.
        query: What is looked for.
        document: Title and text.
        max_document_tokens: How many tokens of piece 3 stay; the others are never cut.
    """
    return query_tokens(tokenizer, query) + document_tokens(tokenizer, document, max_document_tokens)


def query_tokens(tokenizer, query: str) -> list[int]:
    """Pieces 1 and 2 of a prompt: what all documents of a query share."""
    return _encoded(tokenizer, _BEFORE_QUERY) + _encoded(tokenizer, f" {_collapsed(query)}{_BEFORE_DOCUMENT}")


def document_tokens(tokenizer, document: str, max_document_tokens: int) -> list[int]:
    """Pieces 3 and 4 of a prompt."""
    kept = _encoded(tokenizer, f" {_collapsed(document)}")[:max_document_tokens]
    return kept + _encoded(tokenizer, _AFTER_DOCUMENT)


def answer_tokens(tokenizer) -> tuple[int, int]:
    """The tokens of `yes` and `no`; where these are several, their first."""
    yes, no = (_encoded(tokenizer, word)[0] for word in ("yes", "no"))
    return yes, no


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _encoded(tokenizer, text: str) -> Sequence[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
