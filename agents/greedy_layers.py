"""SLEB, as an agent: greedy removal of whole layers, re-measured on the shrunk model (arXiv 2402.09025)."""

import time

from agents.base import SearchResult, Task
from rap_env.importance.trials import RemovalMeter
from rap_env.mask import PruningMask, by_layer
from rap_env.policies import OrderPolicy


class GreedyLayersAgent:
    """Each round drops the layer whose absence gives the lowest calibration loss: l (l + 1) / 2 trials for l layers.

    A round's trials share their streams, and are stored as those of every other importance rule. Both components of a
    layer follow each other in the order; the walk along it ends, and refills, by components as for every order.
    """

    def search(self, task: Task) -> SearchResult:
        started = time.perf_counter()
        problem = task.problem
        meter = RemovalMeter(problem.llm, task.windows, problem.store, held_streams=1)
        mask, left = PruningMask.all_kept(problem.shape), by_layer(problem.shape.components)
        order, losses, n_trials, n_layers = [], [], 0, len(left)
        while left:
            without = {layer: mask.drop(*layer) for layer in left}
            trials = meter.trials_of(list(without.values()))
            n_trials += len(trials)
            least = min(left, key=lambda layer: trials[without[layer]].loss)
            left.remove(least)
            mask = without[least]
            order += [component.name for component in least]
            losses.append(trials[mask].loss)
            task.progress(len(losses), n_layers)
        return SearchResult(
            OrderPolicy(problem.shape, order),
            evaluations=0,
            seconds=time.perf_counter() - started,
            details={"losses": losses},
            calibration_tokens=n_trials * meter.tokens_per_trial,
        )
