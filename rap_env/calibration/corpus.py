"""Where calibration text comes from: local files, a hub data set, or the model itself.

There is one function for each source, and each returns a `Corpus`. Text that the model samples itself is the default,
because it needs no files and no network. It too should pass the contamination check: models recite what they learnt.
"""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rap_env.errors import CorpusUnavailable
from rap_env.rng import isolated_rng

# WikiText marks an article by a line " = Title = "; its sections have " = = Title = = " and stay in the article.
_WIKITEXT_ARTICLE = re.compile(r"^(?= = [^=\n]*[^=\s] = *$)", re.MULTILINE)

# SmolLM2-135M, 60 single removals on 4 x 256 tokens, one seed: rank correlation with the loss increases on WikiText is
# 0.87 for text sampled at 0.95, 0.85 at 1, 0.81 at 0.9 (and 0.94 to 0.96 between WikiText samples). At 1 the text
# drifts into noise: its loss is 3.6, where 0.95 gives 2.6 and WikiText 3.2 to 3.8.
_TOP_P = 0.95


@dataclass(frozen=True)
class Corpus:
    """Calibration text. A value: equal texts have equal digests, whatever their source.

    Attributes:
        name: The source, for messages and records.
        documents: The texts; at least one of them is not blank.

    Raises:
        CorpusUnavailable: Every document is blank, or there is none.
    """

    name: str
    documents: tuple[str, ...]

    def __post_init__(self) -> None:
        if not any(document.strip() for document in self.documents):
            raise CorpusUnavailable(f"calibration corpus {self.name!r} holds no text")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the documents in their order, hexadecimal; the name is left out."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()


def local_corpus(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> Corpus:
    """Reads text files.

    A file is one document, except that WikiText's is split in front of each article's heading ` = Title = `.

    Args:
        paths: UTF-8 text files, or folders whose `*.txt` files are read in the order of their names.

    Raises:
        CorpusUnavailable: A path is missing, not text, or has nothing in it.
    """
    paths = _as_paths(paths)
    documents: list[str] = []
    for file in _files(paths):
        parts = [part for part in _WIKITEXT_ARTICLE.split(_read(file)) if part.strip()]
        if not parts:
            raise CorpusUnavailable(f"calibration text {file} is empty")
        documents += parts
    return Corpus(", ".join(path.name for path in paths), tuple(documents))


def local_text(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> str:
    """Reads text files as they are, one behind the other, as perplexity protocols do.

    Args:
        paths: UTF-8 text files, or folders whose `*.txt` files are read in the order of their names.

    Raises:
        CorpusUnavailable: A path is missing or not text, or a folder has no `*.txt` file.
    """
    return "".join(_read(file) for file in _files(_as_paths(paths)))


def _as_paths(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    return [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files:
            raise CorpusUnavailable(f"calibration folder {path} has no .txt file")
        yield from files


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusUnavailable(f"can't read calibration text {file}: {error}") from error


def hub_corpus(
    dataset: str, config: str | None = None, split: str = "train", text_field: str = "text", limit: int = 1000
) -> Corpus:
    """Takes the first documents of a data set on the Hugging Face hub.

    The data set is streamed, so that a few documents of C4 don't cost its 300 GB. With no network the hub's client
    tries for about 20 seconds before it gives up; `HF_HUB_OFFLINE=1` makes that immediate.

    Args:
        dataset: Name on the hub, for example `allenai/c4`.
        config: Name of the data set's configuration, for example `en`.
        split: Split to read.
        text_field: Column that holds the text.
        limit: Documents to take at most; blank rows don't count.

    Raises:
        CorpusUnavailable: The hub can't be reached, or there is no such data set, split or column.
    """
    texts = _hub_texts(dataset, config, split, text_field)
    return Corpus(f"{dataset} {split}", tuple(itertools.islice(filter(str.strip, texts), limit)))


def _hub_texts(dataset: str, config: str | None, split: str, text_field: str) -> Iterator[str]:
    import datasets  # nobody else should wait for its import

    try:
        for row in datasets.load_dataset(dataset, config, split=split, streaming=True):
            yield row[text_field]
    except KeyError as error:
        raise CorpusUnavailable(
            f"data set {dataset!r} has no column {text_field!r}; known: {', '.join(row)}"
        ) from error
    except (OSError, ValueError) as error:
        raise CorpusUnavailable(
            f"can't load calibration data set {dataset!r} (config {config!r}, split {split!r}) from the hub: {error}."
            " Use text that the model generates itself (calibration=self), or local files (calibration=local)"
        ) from error


def self_generated_corpus(
    llm,
    folder: str | os.PathLike,
    n_documents: int = 8,
    tokens_per_document: int = 300,
    seed: int = 0,
    temperature: float = 1.0,
) -> Corpus:
    """Text that the dense model samples itself; it is sampled once and then read from `folder`.

    Sampling repeats itself only on the same machine and library versions, so the stored text, not the seed, is what
    makes a result repeatable: records should carry `Corpus.digest`. For the same reason a stored file that is damaged
    is an error and not sampled anew.

    Args:
        llm: Has `model` (transformers, dense now), `tokenizer`, `device` and `digest` (of the weights).
        folder: Where the text is stored, in a file for each model and setting; made when it is missing.
        n_documents: Documents, sampled as one batch.
        tokens_per_document: Tokens that are sampled for each document.
        seed: Seed of the sampling; the global random states are left as they were.
        temperature: Sampling temperature.

    Raises:
        CorpusUnavailable: The stored file is damaged.
    """
    settings = {
        "model_digest": llm.digest,
        "dtype": str(llm.model.dtype),
        "n_documents": n_documents,
        "tokens_per_document": tokens_per_document,
        "seed": seed,
        "temperature": temperature,
        "top_p": _TOP_P,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    name, path = f"self-generated {key}", Path(folder) / f"self-{key}.json"
    if not path.exists():
        _store(path, settings, Corpus(name, _sample_documents(llm, settings)))
    return Corpus(name, _stored_documents(path))


def _sample_documents(llm, settings: dict) -> tuple[str, ...]:
    prompts, suppressed = _prompts_and_suppressed(llm, settings["n_documents"], settings["seed"])
    with isolated_rng(settings["seed"]):
        token_ids = llm.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            temperature=settings["temperature"],
            top_p=settings["top_p"],
            top_k=0,  # transformers would cut to 50 tokens
            max_new_tokens=settings["tokens_per_document"],
            suppress_tokens=suppressed or None,
            pad_token_id=0,  # silences a warning; nothing is padded, because no document can end early
            use_cache=True,
        )
    return tuple(llm.tokenizer.batch_decode(token_ids, skip_special_tokens=True))


def _prompts_and_suppressed(llm, n_documents: int, seed: int) -> tuple[torch.Tensor, list[int]]:
    """First tokens, shape [n_documents, 1], and the tokens that are never sampled: special ones and empty rows.

    Documents start from BOS, whose continuation is as varied as the training text. A tokenizer without BOS gets
    random ordinary tokens, one for each document.
    """
    tokenizer, eos = llm.tokenizer, llm.model.generation_config.eos_token_id
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids) | set(eos if isinstance(eos, list) else [eos]) - {None}
    beyond_tokenizer = range(len(tokenizer), llm.model.get_input_embeddings().num_embeddings)
    if tokenizer.bos_token_id is not None:
        first = np.full(n_documents, tokenizer.bos_token_id)
    else:
        first = np.random.default_rng(seed).choice(sorted(set(range(len(tokenizer))) - special), n_documents)
    return torch.from_numpy(first)[:, None].to(llm.device), sorted(special | set(beyond_tokenizer))


def _store(path: Path, settings: dict, corpus: Corpus) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    record = {"settings": settings, "digest": corpus.digest, "documents": corpus.documents}
    unfinished.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(unfinished, path)  # a reader sees the whole file or none


def _stored_documents(path: Path) -> tuple[str, ...]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        documents = tuple(record["documents"])
        intact = record["digest"] == Corpus(path.name, documents).digest
    except (ValueError, KeyError, TypeError, AttributeError, CorpusUnavailable):
        intact = False
    if not intact:
        raise CorpusUnavailable(f"stored calibration text {path} is damaged; delete it to have it sampled again")
    return documents
