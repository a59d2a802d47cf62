"""Where calibration text comes from: this package, local files, or a data set on the hub.

There is one function for each source, and each returns a `Corpus`. The packaged text is the default: it needs neither
files nor a network, and is the same on every machine. SmolLM2-135M-Instruct sampled it, with `scripts/sample_text.py`.
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

from rap_env.errors import CorpusUnavailable, check_known

# WikiText marks an article by a line " = Title = "; its sections have " = = Title = = " and stay in the article.
_WIKITEXT_ARTICLE = re.compile(r"^(?= = [^=\n]*[^=\s] = *$)", re.MULTILINE)

TEXT_FOLDER = Path(__file__).parent / "text"


@dataclass(frozen=True)
class Corpus:
    """Calibration text. A value: equal texts have equal digests, whatever their source.

    Attributes:
        name: The source, for messages and records.
        documents: The texts; at least one of them is not blank.
        kinds: Of each document its kind of text; nothing where they are of one.

    Raises:
        CorpusUnavailable: Every document is blank, or there is none, or not as many kinds.
    """

    name: str
    documents: tuple[str, ...]
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not any(document.strip() for document in self.documents):
            raise CorpusUnavailable(f"calibration corpus {self.name!r} holds no text")
        if self.kinds and len(self.kinds) != len(self.documents):
            raise CorpusUnavailable(
                f"calibration corpus {self.name!r}: expected a kind for each of {len(self.documents)} documents;"
                f" got {len(self.kinds)}"
            )

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the documents in their order, and their kinds, hexadecimal; the name is left out."""
        return hashlib.sha256("\0".join((*self.documents, *self.kinds)).encode()).hexdigest()

    def by_kind(self) -> "dict[str, Corpus]":
        """The documents of each kind, kinds in the order in which they come first; itself where there are none."""
        documents: dict[str, list[str]] = {}
        for kind, document in zip(self.kinds, self.documents if self.kinds else (), strict=True):
            documents.setdefault(kind, []).append(document)
        of_kinds = {kind: Corpus(f"{self.name}, {kind}", tuple(texts)) for kind, texts in documents.items()}
        return of_kinds or {"": self}


def packaged_corpus(name: str = "calibration") -> Corpus:
    """The text that ships with this package.

    Args:
        name: `"calibration"` (8 documents of 300 tokens for SmolLM2) or `"evaluation"` (12 others).

    Raises:
        UnknownName: There is no such text.
    """
    files = {file.stem: file for file in TEXT_FOLDER.glob("*.jsonl")}
    lines = files[check_known("packaged text", name, files)].read_text(encoding="utf-8").strip().split("\n")
    return Corpus(f"packaged {name} text", tuple(json.loads(line)["text"] for line in lines))


def local_corpus(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> Corpus:
    """Reads text files.

    A file is one document, except that WikiText's is split in front of each article's heading ` = Title = `.

    Args:
        paths: UTF-8 text files, or folders whose `*.txt` files are read in the order of their names.

    Raises:
        CorpusUnavailable: A path is missing, not text, or has nothing in it.
    """
    documents: list[str] = []
    for file in _files(paths):
        parts = [part for part in _WIKITEXT_ARTICLE.split(_read(file)) if part.strip()]
        if not parts:
            raise CorpusUnavailable(f"calibration text {file} is empty")
        documents += parts
    return Corpus(", ".join(path.name for path in _as_paths(paths)), tuple(documents))


def local_text(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> str:
    """Reads text files as they are, one behind the other, as perplexity protocols do.

    Args:
        paths: UTF-8 text files, or folders whose `*.txt` files are read in the order of their names.

    Raises:
        CorpusUnavailable: A path is missing or not text, or a folder has no `*.txt` file.
    """
    return "".join(map(_read, _files(paths)))


def _as_paths(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    return [Path(os.path.expanduser(path)) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def _files(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> Iterator[Path]:
    for path in _as_paths(paths):
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
            " Use the text that ships with this package (calibration=packaged), or local files (calibration=local)"
        ) from error
