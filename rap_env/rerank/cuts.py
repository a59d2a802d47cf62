"""A small set of decisions: cuts at gaps in the scores around the last open place."""

from dataclasses import dataclass

import numpy as np

from rap_env.rerank.selection import Decision

MARGINS = (0.25, 0.5, 1.0, 2.0)  # in units of the spread that scores have at a layer


@dataclass(frozen=True)
class Cut:
    """Who leaves: whoever is a margin away from the other side of the border between the places and the rest.

    Attributes:
        selects: Whether candidates are selected that are a margin above the best one without a place.
        drops: Whether candidates are dropped that are a margin below the last one with a place.
        margin: In units of the scores' spread. With 0, both sides leave as a whole, and the request ends.
    """

    selects: bool
    drops: bool
    margin: float

    def decision(self, scores: np.ndarray, n_open: int, unit: float) -> Decision:
        """What it says of n candidates; where just as many would go on as there are places, they are selected.

        Args:
            scores: Theirs [n]; of equal ones the first is the better.
            n_open: Open places, from 1 to n.
            unit: One unit of the margin, in units of the scores; positive.
        """
        order = np.argsort(-scores, kind="stable")
        ranked, far = scores[order], self.margin * unit
        n_selected, n_kept = 0, len(scores)
        if n_kept > n_open:
            if self.selects:
                n_selected = int(np.count_nonzero(ranked[:n_open] - ranked[n_open] >= far))
            if self.drops:
                n_kept -= int(np.count_nonzero(ranked[n_open - 1] - ranked[n_open:] >= far))
            ends = (n_selected == n_open or n_kept == n_open) and (self.selects or self.drops)
        else:
            ends = self.selects or self.drops
        if ends:
            n_selected = n_kept = n_open
        numbers = order.tolist()
        return Decision(tuple(numbers[:n_selected]), tuple(numbers[n_kept:]), tuple(numbers[n_selected:n_kept]))


GO_ON, STOP = Cut(False, False, 0.0), Cut(True, True, 0.0)
CUTS = (
    GO_ON,
    STOP,
    *(Cut(False, True, margin) for margin in MARGINS),
    *(Cut(True, False, margin) for margin in MARGINS),
    *(Cut(True, True, margin) for margin in MARGINS),
)
