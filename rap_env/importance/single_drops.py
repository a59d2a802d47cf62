"""What each component is worth on its own: the dense model's loss increase when it alone is dropped."""

import torch

from rap_env.evaluation.store import ResultStore
from rap_env.importance.trials import RemovalMeter
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


def single_drop_increases(
    llm: SwitchableLLM, windows: torch.Tensor, store: ResultStore | None = None
) -> tuple[dict[str, float], int]:
    """Measures the dense model and each of its components' absence once, on all windows.

    Args:
        llm: The model.
        windows: Calibration tokens [N, T].
        store: Keeps finished trials, and shares them with greedy importance on the same windows.

    Returns:
        The increase of the mean loss by component name (negative where the model is better without it), and the tokens
        of all trials, whether they were stored already or not.
    """
    meter = RemovalMeter(llm, windows, store, held_streams=1)
    dense = PruningMask.all_kept(llm.shape)
    dense_loss = meter.trial(dense).loss
    increases = {name: trial.loss - dense_loss for name, trial in meter.trials(dense).items()}
    return increases, (1 + len(increases)) * meter.tokens_per_trial
