"""What an environment stands on when nothing is given: the embedded model, tasks and text, or a table of its scores."""

import functools
from dataclasses import dataclass

from rap_env.envs.table import table_importance, table_problem
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import CALIBRATION, greedy_sequential_importance
from rap_env.importance.source import ImportanceSource
from rap_env.llm.embedded import cache_folder
from rap_env.llm.loading import load_llm
from rap_env.problem import PruningProblem

EMBEDDED, TABLE = EVALUATIONS = ("embedded", "table")


@dataclass(frozen=True)
class Defaults:
    """The two heavy parts of an environment."""

    problem: PruningProblem
    importance: ImportanceSource


@functools.cache
def embedded_problem() -> PruningProblem:
    """The embedded model on the embedded tasks, with the store in the cache folder; one for all of a process."""
    return PruningProblem(load_llm(), HarnessEvaluator(["rap_search"]), ResultStore(cache_folder() / "results.db"))


@functools.cache
def embedded_defaults() -> Defaults:
    """The same with a ranking of its components; measured once, then read from the store.

    The first call on a machine measures the ranking, which takes minutes on a laptop; environments of one process
    share the result.
    """
    from rap_env.calibration import packaged_corpus, random_windows  # here, and not for every import of the package

    problem = embedded_problem()
    llm, store = problem.llm, problem.store
    windows = random_windows(packaged_corpus(), llm.tokenizer, n_samples=2, tokens_per_sample=256, seed=0)
    ranking = greedy_sequential_importance(llm, windows, exact=False, store=store)
    meter = Meter(llm, PerplexityEvaluator(windows, CALIBRATION), store)
    return Defaults(problem, ImportanceSource(ranking.order, meter))


def default_problem(evaluation: str) -> PruningProblem:
    """The problem of an environment that is given none, by one of `EVALUATIONS`."""
    return table_problem() if evaluation == TABLE else embedded_problem()


def default_importance(evaluation: str) -> ImportanceSource:
    """The ranking of one that is given none."""
    return table_importance() if evaluation == TABLE else embedded_defaults().importance
