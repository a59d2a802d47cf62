"""From one mask to another while sequences are in flight: what goes leaves first, what comes is read ahead."""

import logging
import operator
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from typing import Literal, get_args

from rap_env.errors import WeightsUnavailable
from rap_env.llm.live import LiveModel
from rap_env.mask import PruningMask
from rap_env.memory.measured import trim_freed_memory
from rap_env.serving.controller import Controller
from rap_env.serving.request import Sequence

_log = logging.getLogger(__name__)

Restoring = Literal["exact", "left out", "from now"]
RESTORING = get_args(Restoring)
_SITES_AT_ONCE = 12  # where each has a copy of its own


class Switching:
    """Applies masks to a model, and takes the caches of sequences in flight over.

    Args:
        model: Nothing else may apply masks to it.
        controller: Is told what the model runs with in the end.
        restoring: What KV heads that come back mean to sequences in flight; see `Options`.
    """

    def __init__(self, model: LiveModel, controller: Controller, restoring: Restoring) -> None:
        self._model, self._controller, self._restoring = model, controller, restoring
        self._coming: tuple[PruningMask, Future] | None = None  # weights that are being read
        controller.applied(model.llm.mask)

    @property
    def weight_bytes(self) -> int:
        """What the weights of the components take that are in memory, or are being read."""
        return (self._model.llm.mask if self._coming is None else self._coming[0]).weight_bytes

    def follow(self, wanted: PruningMask | None, running: list[Sequence]) -> bool:
        """Comes as near to a mask as it can now; what is missing comes with a later call.

        What both masks drop leaves before anything comes, so that they are never in memory together. Weights that come
        back are read by the store's thread first, and until that is done the model goes on without them; if they can't
        be read it stays so.

        Args:
            wanted: The mask; None to stay.
            running: The sequences in flight.

        Returns:
            Whether the model's mask changed.
        """
        before = self._model.llm.mask
        if self._coming is not None and self._coming[0] != wanted:
            self._give_up()
        if wanted is None or wanted == before:
            return False
        fewer = PruningMask(wanted.components, tuple(map(operator.and_, before.keep, wanted.keep)))
        if fewer != before:
            self._apply(fewer, running)
            trim_freed_memory()
        if fewer != wanted and self._arrived(wanted, wait_for_it=not running):
            self._coming = None
            try:
                self._apply(wanted, running)
            except WeightsUnavailable:
                _log.exception("weights could not be read; going on without them")
                self._controller.applied(fewer)
        return self._model.llm.mask != before

    def _arrived(self, wanted: PruningMask, wait_for_it: bool) -> bool:
        """Whether weights that come back were read ahead; if not, that is begun."""
        store = self._model.llm.store
        if store is None:
            return True
        if self._coming is None:
            self._coming = wanted, store.prefetch(wanted)
        if wait_for_it:
            wait([self._coming[1]])
        return self._coming[1].done()

    def _give_up(self) -> None:
        """Lets go of what was read ahead for a mask that is not wanted any more."""
        _mask, future = self._coming
        self._coming = None
        wait([future])
        self._model.llm.store.release(self._model.llm.mask)

    def _apply(self, mask: PruningMask, running: Iterable[Sequence]) -> None:
        for part in self._gradually(mask):
            self._model.switch(part)
        for sequence in running:
            if self._restoring == "exact" and sequence.cache.lacks(self._model.heads):
                sequence.cache = None  # before the new one takes memory
                sequence.cache = self._model.new_cache(sequence.request.length)
            else:
                sequence.cache.switch(self._model.heads, "from now" if self._restoring == "from now" else "left out")

    def _gradually(self, mask: PruningMask) -> Iterator[PruningMask]:
        """The masks on the way to one: where sites run with copies, the old and the new ones are in memory together."""
        before, store = self._model.llm.mask, self._model.llm.store
        keep, sites = list(before.keep), [own for _site, own in mask.components.sites]
        changed = [own for own in sites if before.keep[own] != mask.keep[own]]
        n_at_once = _SITES_AT_ONCE if store is not None and store.has_copies else len(changed)
        for first in range(0, len(changed), max(1, n_at_once)):
            for own in changed[first : first + n_at_once]:
                keep[own] = mask.keep[own]
            yield PruningMask(mask.components, tuple(keep))
