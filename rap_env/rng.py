"""The only place that touches global random state."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def _set_states(python_state, numpy_state, torch_state, cuda_states) -> None:
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    if cuda_states:
        torch.cuda.set_rng_state_all(cuda_states)


@contextlib.contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Runs foreign code without letting it touch our random streams.

    Python's, numpy's and torch's global states (CUDA's too, where there is one) are restored on the way out, also
    when the body raises. lm-eval reseeds all three on every call, which would make an agent repeat its actions.

    Args:
        seed: Seeds the three generators for the body; None leaves them as they are.
    """
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda_states
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        _set_states(*states)


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy and torch; called once, at the start of a run."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
