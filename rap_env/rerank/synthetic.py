"""Score paths drawn from a seed, in which ranks settle gradually: for tests, and to try things without a model."""

import numpy as np

from rap_env.rerank.paths import ScorePaths


def synthetic_paths(
    n_queries: int = 256, n_candidates: int = 20, n_layers: int = 24, seed: int = 0, settled: float = 0.5
) -> ScorePaths:
    """Scores that grow out of noise: the noise of a layer is mostly that of the layer before, and fades.

    Queries differ in when their scores settle, and in how far apart they are in the end. Nothing about real models
    follows from them.

    Args:
        n_queries: How many.
        n_candidates: Of each.
        n_layers: At least 2.
        seed: Of everything.
        settled: Where half of the score is settled on the mean, as a share of the layers.
    """
    rng = np.random.default_rng(seed)
    depth = np.linspace(0.0, 1.0, n_layers)
    scores = []
    for _ in range(n_queries):
        final = rng.normal(size=n_candidates) * rng.uniform(0.7, 1.5)
        middle = settled + rng.uniform(-0.2, 0.2)
        share = 1.0 / (1.0 + np.exp(-12.0 * (depth - middle)))
        noise = rng.normal(size=n_candidates)
        path = np.empty((n_layers, n_candidates))
        for layer in range(n_layers):
            noise = 0.9 * noise + np.sqrt(1 - 0.9**2) * rng.normal(size=n_candidates)
            own = share[layer] * final + (1.0 - share[layer]) * noise
            path[layer] = (1.0 + 3.0 * depth[layer]) * own - 2.0 * depth[layer]  # scores of models spread with depth
        scores.append(path)
    tokens = tuple(rng.integers(40, 400, n_candidates) for _ in range(n_queries))
    grades = tuple(np.full(n_candidates, np.nan) for _ in range(n_queries))
    names = tuple(f"drawn {number}" for number in range(n_queries))
    return ScorePaths(names, tuple(scores), tokens, grades, {"synthetic": True, "seed": seed, "settled": settled})
