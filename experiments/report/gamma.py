"""How far an early order agrees with the last one."""

import numpy as np


def goodman_kruskal_gamma(first: np.ndarray, second: np.ndarray) -> float:
    """Goodman and Kruskal's gamma of two scorings of the same documents: (C - D) / (C + D).

    C counts pairs of documents that both put in the same order, D those that they put in opposite orders; pairs that
    are equal for one of them count for neither. 1 is the same order, -1 the reversed one, 0 no relation.

    Args:
        first: Scores [n].
        second: Scores [n].

    Returns:
        NaN where every pair is equal for one of them.
    """
    signs = np.sign(np.subtract.outer(first, first)) * np.sign(np.subtract.outer(second, second))
    same, opposite = int((signs > 0).sum()), int((signs < 0).sum())
    return (same - opposite) / (same + opposite) if same + opposite else float("nan")


def gamma_by_layer(path: np.ndarray) -> list[float]:
    """Gamma between the scores after each layer and those after the last one.

    Args:
        path: Scores of a request after every layer [layers, n].
    """
    return [goodman_kruskal_gamma(scores, path[-1]) for scores in path]
