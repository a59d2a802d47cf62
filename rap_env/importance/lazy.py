"""The lazy rule: most of a round's evaluations can only confirm what earlier ones say, so they are not made."""

import math
from collections import Counter, deque
from collections.abc import Mapping

import torch

from rap_env.evaluation.meter import Meter
from rap_env.importance.block_influence import block_influence
from rap_env.importance.rounds import Removal, Rounds, price

# Part of the windows that a component is looked at first.
_SKETCH = 0.25
# Part of the components that the first round looks at; block influence, which one forward tells of all, screens out
# the others, which turn the residual stream most.
_SCREENED_IN = 0.5
# Part of the components that the first round tries on all windows; the sketch rules the others out.
_FIRST_ROUND = 0.2
# Kept components on each side of a removed one that are looked at again whatever they were: what a removal changes
# lies beside it.
_NEIGHBOURS = 1
# Looks whose error tells how far the next one may be off.
_ERRORS = 16


class LazyRounds(Rounds):
    """Rounds that try only what looks least important, until something that was tried in the round does.

    As in Minoux's lazy greedy search, an increase that was measured in an earlier round stands for the present one: on
    a model that has lost more it is hardly ever smaller, but beside what was removed. A component whose turn comes is
    looked at on a sketch first, a part of the windows; the change that the sketch shows since the last look is taken
    for that of all windows. Only if the component still looks least important the other windows follow. The loss after
    a removal is that of all windows.

    The first round does not look at the components of the greatest block influence. Until they are looked at, as
    neighbours of a removal or because all others cost more by now, their increases are taken for proportional to it.

    Args:
        sketch: Measures the first windows.
        rest: Measures the others; None where one window is all there is.
        freed: What dropping each component is worth.
    """

    def __init__(self, sketch: Meter, rest: Meter | None = None, *, freed: Mapping[str, int]) -> None:
        super().__init__(sketch.llm.shape, freed)
        self._sketch, self._rest = sketch, rest
        self._sketch_loss, *rest_loss = (-m.evaluate([self.mask], near=self.mask)[0].score for m in (sketch, rest) if m)
        self.loss = self.known[self.mask] = self._mean(self._sketch_loss, *rest_loss)
        self._sketched: dict[str, float] = {}  # increases on the sketch alone, when they were measured last
        self._slack: dict[str, float] = {}  # by how much an increase may be lower than it is thought to be
        self._errors: deque[float] = deque(maxlen=_ERRORS)

    def remove_least_important(self) -> Removal:
        sketched: dict[str, float] = {}  # losses of this round's masks
        complete: dict[str, float] = {}
        if not self.increases:
            self._first_round(sketched, complete)
        while (name := self._cheapest()) not in complete:
            if name not in sketched:
                sketched |= self._losses(self._sketch, [name], near=self.mask)
                self._look(name, sketched[name])
            else:
                complete[name] = self._complete(name, sketched[name])
        self._doubt_neighbours(name)
        self.mask, self.loss, self._sketch_loss = self.mask.drop(name), complete[name], sketched[name]
        del self.increases[name]
        return Removal(name, self.loss)

    def _first_round(self, sketched: dict[str, float], complete: dict[str, float]) -> None:
        influences = self._influences()
        ranked = sorted(influences, key=lambda name: price(influences[name], self._freed[name]))
        n_looked = math.ceil(_SCREENED_IN * len(ranked))
        looked, screened = ranked[:n_looked], ranked[n_looked:]
        sketched |= self._losses(self._sketch, looked)
        for name in looked:
            self._look(name, sketched[name])
        for name in sorted(looked, key=self._price)[: round(_FIRST_ROUND * len(ranked))]:
            complete[name] = self._complete(name, sketched[name])
        self._slack |= {name: self._sketch_error for name in looked if name not in complete}
        most = max(looked, key=self._price)
        for name in screened:
            # What does nothing has an influence of 0: then nothing is known of the others, and 0 is cautious.
            scale = influences[name] / influences[most] if influences[most] > 0.0 else 0.0
            self.increases[name] = max(0.0, self.increases[most]) * scale
            self._slack[name] = 0.0
        self.first_increases = dict(self.increases)

    def _influences(self) -> dict[str, float]:
        """Block influence of every component's site on the sketch, shared evenly by the parts of a site."""
        sites = self._sketch.llm.shape.sites
        of_sites = dict(zip(sites, block_influence(self._sketch, [[site] for site in sites]), strict=True))
        n_parts = Counter(component.site for component in self.mask.components)
        return {c.name: of_sites[c.site] / n_parts[c.site] for c in self.mask.components}

    def _doubt_neighbours(self, removed: str) -> None:
        kept = [component.name for component in self.mask.kept]
        position = kept.index(removed)
        for name in kept[max(0, position - _NEIGHBOURS) : position + _NEIGHBOURS + 1]:
            self._slack[name] = math.inf

    def _look(self, name: str, sketch_loss: float) -> None:
        sketched = sketch_loss - self._sketch_loss
        known_error = self.increases[name] - self._sketched[name] if name in self._sketched else 0.0
        self.increases[name] = sketched + known_error
        self._sketched[name] = sketched
        self._slack[name] = self._sketch_error

    def _complete(self, name: str, sketch_loss: float) -> float:
        rest_loss = self._losses(self._rest, [name], near=self.mask).values() if self._rest else ()
        loss = self._mean(sketch_loss, *rest_loss)
        self.known[self.mask.drop(name)] = loss
        self._errors.append(abs(loss - self.loss - self.increases[name]))
        self.increases[name], self._slack[name] = loss - self.loss, 0.0
        return loss

    @property
    def _sketch_error(self) -> float:
        """How far the latest looks were from the increases on all windows, on the mean."""
        return sum(self._errors) / len(self._errors) if self._errors else 0.0

    def _cheapest(self) -> str:
        return min(self.increases, key=lambda name: price(self.increases[name] - self._slack[name], self._freed[name]))

    def _mean(self, sketch_loss: float, rest_loss: float | None = None) -> float:
        if rest_loss is None:
            return sketch_loss
        sketched, rest = self._sketch.tokens_each, self._rest.tokens_each
        return (sketched * sketch_loss + rest * rest_loss) / (sketched + rest)


def split_windows(windows: torch.Tensor) -> list[torch.Tensor]:
    """The sketch's windows and the others, or one part where one window is all there is."""
    n_sketched = max(1, round(_SKETCH * len(windows)))
    return [part for part in (windows[:n_sketched], windows[n_sketched:]) if len(part)]
