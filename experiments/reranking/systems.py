"""The rerankers that are compared: who reads the documents, and what of it is switched on."""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rap_env.errors import check_known

RERANKER, PADDED, OFFLOADED, CROSS_ENCODER, HEADS = "reranker", "padded", "offloaded", "cross_encoder", "heads"
CLUSTERS, MARGINS = "clusters", "margins"
SMALL, LARGE = "small", "large"
_PACKAGES = {OFFLOADED: "accelerate", CROSS_ENCODER: "sentence_transformers"}


@dataclass(frozen=True)
class System:
    """One way of reranking.

    Attributes:
        reads: `"reranker"`, this package's; or, over the same prompts, `"padded"` batches of transformers, the same
            with layers `"offloaded"` to the disk by accelerate, or sentence-transformers' `"cross_encoder"`; or, over
            one prompt with all documents, attention `"heads"`.
        prunes: By which rule documents leave early: the published one over `"clusters"`, or by `"margins"` that each
            layer has from calibration; None: nobody does.
        streams: Whether only two sites' weights are in memory.
        chunks: In chunks of which size a layer reads the documents: `"small"` ones, to save memory, `"large"` ones, or
            None: all at once.
        caches_rows: Whether only some rows of the embedding are in memory.
        files_states: Whether the hidden states of the documents are in a file, and only a chunk's in memory.
        masks: Whether the model runs without some groups of MLP channels.
        weights: Number format of the weights.
    """

    reads: str = RERANKER
    prunes: str | None = None
    streams: bool = False
    chunks: str | None = LARGE
    caches_rows: bool = False
    files_states: bool = False
    masks: bool = False
    weights: str = "full"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def package(self) -> str | None:
        """The package that this system needs beyond those of all."""
        return _PACKAGES.get(self.reads)

    @property
    def missing_package(self) -> str | None:
        """That package, where it is not installed."""
        return self.package if self.package and importlib.util.find_spec(self.package) is None else None


_SAVING = System(prunes=MARGINS, streams=True, chunks=SMALL, caches_rows=True, files_states=True)  # everything is on

SYSTEMS = {
    "hf": System(PADDED),
    "hf_offload": System(OFFLOADED),
    "cross_encoder": System(CROSS_ENCODER),
    "heads": System(HEADS),
    "int8": System(weights="int8"),
    "full": System(),
    "pruned": System(prunes=CLUSTERS),
    "margins": System(prunes=MARGINS),
    "streamed": replace(_SAVING, prunes=None),
    "streamed_pruned": replace(_SAVING, prunes=CLUSTERS),
    "streamed_margins": _SAVING,
    # From everything on, one part is off; without pruning it is `streamed`.
    "without_streaming": replace(_SAVING, streams=False),
    "without_chunks": replace(_SAVING, chunks=None),
    "without_row_cache": replace(_SAVING, caches_rows=False),
    "without_states_in_file": replace(_SAVING, files_states=False),
    "pruning_alone": System(prunes=MARGINS, chunks=None),
    "masked": System(masks=True),
    "masked_pruned": System(prunes=CLUSTERS, masks=True),
}


def systems_of(names: Sequence[str]) -> dict[str, System]:
    """Looks systems up by name.

    Raises:
        UnknownName: There is no such system.
    """
    return {name: SYSTEMS[check_known("system", name, SYSTEMS)] for name in names}
