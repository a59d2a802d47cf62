"""Which number format each site gets: a table of what each costs alone, and the choice for a budget, solved exactly."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from rap_env.errors import InvalidConfig
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm.formats import check_weights_known, in_format, put_matrices, quantise, site_matrices
from rap_env.llm.switchable import SwitchableLLM

BASE = "int8"  # of sites that nothing else is said of, as in `quantise`


@dataclass(frozen=True)
class SiteFormat:
    """A row of the table.

    Attributes:
        site: Its name.
        weights: The format.
        weight_bytes: What the site takes in it.
        increase: By how much the loss is above that of INT8 everywhere when this site alone is in the format, in nats.
    """

    site: str
    weights: str
    weight_bytes: int
    increase: float


@dataclass(frozen=True)
class FormatTable:
    """Rows for each site, INT8 among them, and what all sites have in common.

    Attributes:
        loss: Of INT8 everywhere, in nats for each token.
        fixed_bytes: Weights beside the sites: embedding, untied head, norms.
        rows: All formats of the first site, then of the next.
    """

    loss: float
    fixed_bytes: int
    rows: tuple[SiteFormat, ...]

    @property
    def sites(self) -> dict[str, list[SiteFormat]]:
        """The rows of each site, the smallest format first."""
        rows = sorted(self.rows, key=lambda row: row.weight_bytes)
        return {name: [row for row in rows if row.site == name] for name in dict.fromkeys(r.site for r in self.rows)}

    @property
    def least_bytes(self) -> int:
        """What the model takes with each site in its smallest format."""
        return self.fixed_bytes + sum(rows[0].weight_bytes for rows in self.sites.values())

    def chosen(self, weights: Mapping[str, str]) -> list[SiteFormat]:
        """The row of each site; `weights` as `quantise` takes them."""
        return [row for row in self.rows if row.weights == weights.get(row.site, BASE)]

    def weight_bytes(self, weights: Mapping[str, str]) -> int:
        return self.fixed_bytes + sum(row.weight_bytes for row in self.chosen(weights))

    def increase(self, weights: Mapping[str, str]) -> float:
        """The loss above INT8 everywhere, if what sites cost alone adds up."""
        return sum(row.increase for row in self.chosen(weights))

    def cheapest(self, budget_bytes: int) -> dict[str, str]:
        """The formats whose increases sum to the least among those that fit: a multiple-choice knapsack.

        With x = 1 for the rows that are chosen:

            minimise    sum of increases * x
            subject to  sum of bytes * x <= budget - fixed bytes,   sum of a site's x = 1,   x in {0, 1}

        A site whose loss falls in a smaller format is put in it whether or not the budget asks for that.

        Args:
            budget_bytes: For all weights of the model.

        Returns:
            Formats by site, those left out that are INT8, as `quantise` takes them.

        Raises:
            InvalidConfig: Nothing is that small.
        """
        if budget_bytes < self.least_bytes:
            raise InvalidConfig(
                f"expected a budget of at least {self.least_bytes:,} bytes, which the model takes with each site in its"
                f" smallest format; got {budget_bytes:,}"
            )
        # The solver's tolerances are absolute: bytes in units of their common divisor, costs relative to the largest.
        n_bytes = np.array([row.weight_bytes for row in self.rows])
        costs = np.array([row.increase for row in self.rows])
        unit = np.gcd.reduce(n_bytes)
        one_each = np.array([[row.site == name for row in self.rows] for name in self.sites], dtype=float)
        solution = milp(
            costs / (np.abs(costs).max() or 1.0),
            integrality=np.ones_like(n_bytes),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(n_bytes // unit, ub=math.floor((budget_bytes - self.fixed_bytes) / unit)),
                LinearConstraint(one_each, lb=1, ub=1),
            ],
            options={"mip_rel_gap": 0.0},
        )
        assert solution.success, solution.message
        taken = [row for row, x in zip(self.rows, solution.x.round(), strict=True) if x]
        weights = {row.site: row.weights for row in taken if row.weights != BASE}
        assert self.weight_bytes(weights) <= budget_bytes
        return weights


class MixedFormats:
    """A model in INT8 whose sites can be put in other formats and back, without loading it again.

    Args:
        llm: The model as it was loaded; stays as it is.

    Raises:
        UnsupportedArchitecture: It is quantised already, or can't be.
    """

    def __init__(self, llm: SwitchableLLM) -> None:
        self._loaded = site_matrices(llm.model)
        self.llm = SwitchableLLM(quantise(copy.deepcopy(llm.model), BASE), llm.tokenizer, llm.name)

    @contextlib.contextmanager
    def sites_in(self, weights: Mapping[str, str]) -> Iterator[SwitchableLLM]:
        """Runs the body with the model that `quantise` makes of the loaded one with these formats of sites."""
        before = site_matrices(self.llm.model)
        named = {site: weights[site.name] for site in before if site.name in weights}
        try:
            put_matrices(
                self.llm.model, {site: in_format(site, self._loaded[site], each) for site, each in named.items()}
            )
            self.llm.weights_changed()
            yield self.llm
        finally:
            put_matrices(self.llm.model, {site: before[site] for site in named})
            self.llm.weights_changed()

    def loss(self, evaluator: PerplexityEvaluator, weights: Mapping[str, str]) -> float:
        """Mean loss with these formats of sites, in nats for each token."""
        with self.sites_in(weights) as llm:
            return -evaluator.evaluate(llm).score

    def table(
        self, evaluator: PerplexityEvaluator, formats: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> FormatTable:
        """Measures each site alone in each format, one evaluation each, and INT8 everywhere.

        Args:
            evaluator: Of calibration text.
            formats: Beside INT8, which all sites can have.
            progress: Is told how many evaluations are done, and of how many.

        Raises:
            UnknownName: There is no such format.
            UnsupportedArchitecture: A matrix can't be INT4.
        """
        for each in formats:
            check_weights_known(each)
        loss, rows, others = self.loss(evaluator, {}), [], [each for each in dict.fromkeys(formats) if each != BASE]
        bytes_of = {row.name: row.weight_bytes for row in self.llm.shape.components}
        for done, (name, n_bytes) in enumerate(bytes_of.items()):
            rows.append(SiteFormat(name, BASE, n_bytes, 0.0))
            for number, each in enumerate(others, 1):
                with self.sites_in({name: each}) as llm:
                    (row,) = (row for row in llm.shape.components if row.name == name)
                    rows.append(SiteFormat(name, each, row.weight_bytes, -evaluator.evaluate(llm).score - loss))
                if progress is not None:
                    progress(done * len(others) + number, len(bytes_of) * len(others))
        return FormatTable(loss, self.llm.shape.fixed_bytes, tuple(rows))
