"""Steps of generation on a GPU, recorded as one graph of kernels: launching each takes longer than running it."""

import weakref
from collections.abc import Callable
from typing import Any

import torch


class RecordedSteps:
    """Runs steps of one token for each of some sequences; what the same sequences do again is recorded and replayed.

    A step is recorded when it comes a second time, with the same sequences and as many keys and rows.
    Where sequences come and go at each step nothing is.

    Args:
        forward: Computes logits [N, V] of tokens and positions [2, N] and a stream that attends by `positions`. The
            weights that it runs with stay where they are as long as this object is used.
    """

    def __init__(self, forward: Callable[[torch.Tensor, Any], torch.Tensor]) -> None:
        self._forward = forward
        self._asked: tuple | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, inputs: torch.Tensor, stream: Any) -> torch.Tensor:
        """Logits [N, V].

        Args:
            inputs: Tokens and positions [2, N].
            stream: Has `step`, the caches, `n_keys` and `positions`.
        """
        caches = tuple((weakref.ref(cache), cache.switches) for cache in stream.step)
        asked = caches, stream.n_keys, inputs.shape[1]
        if asked != self._asked:
            self._asked, self._graph = asked, None
            return self._forward(inputs, stream)
        if self._graph is None:
            self._record(inputs, stream)
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._logits.clone()

    def _record(self, inputs: torch.Tensor, stream: Any) -> None:
        self._inputs = inputs.clone()
        stream.positions = self._inputs[1]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward(self._inputs, stream)
