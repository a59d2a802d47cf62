"""Score paths of calibration queries from a file of `experiments.selection_paths`, in place of reading them again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rap_env.errors import InvalidConfig
from rap_env.rerank.paths import ScorePaths


def recorded_paths(
    file: str | Path, names: Sequence[str], n_candidates: int, source: Mapping[str, Any]
) -> list[np.ndarray]:
    """Scores of some queries after every layer, each [layers, n].

    Args:
        file: The .npz file.
        names: Of the queries.
        n_candidates: The first documents of each.
        source: What the file's provenance has to say of itself: the model's digest, where documents were cut.

    Raises:
        InvalidConfig: It says something else, or lacks a query or some of its candidates.
        FileNotFoundError, PathsUnreadable: As `ScorePaths.load`.
    """
    paths = ScorePaths.load(file)
    own = {key: paths.provenance.get(key) for key in source}
    if own != dict(source):
        raise InvalidConfig(f"expected score paths of {dict(source)}; {file} has those of {own}")
    if unknown := sorted({*names} - {*paths.queries}):
        raise InvalidConfig(f"expected score paths of all calibration queries; {file} has none of {', '.join(unknown)}")
    if (fewest := paths.provenance.get("candidates", 0)) < n_candidates:
        raise InvalidConfig(f"expected score paths of {n_candidates} candidates; {file} has those of {fewest}")
    return list(paths.part(names).first(n_candidates).scores)
