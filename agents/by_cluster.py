"""One search for each cluster of the search text, and a policy that retrieves by text (EvoP, arXiv 2502.14910)."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from agents.base import SearchResult, Task
from rap_env.calibration import k_means
from rap_env.errors import CorpusUnavailable, EvaluationFailed
from rap_env.evaluation.perplexity import TextEvaluator
from rap_env.llm.sentences import encode_sentences
from rap_env.policies import RetrievalPolicy
from rap_env.problem import EvaluationBudget


def search_by_cluster(search: Callable[[Task], SearchResult], task: Task, n_clusters: int) -> SearchResult:
    """Clusters the windows that masks are searched on, and searches once on those of each cluster.

    Every search may ask about as many masks as the task's evaluation budget leaves. Together they forward as many
    tokens as one search on all windows. The result counts these as calibration tokens: none is an evaluation by the
    task's own problem.

    Args:
        search: Ends as an archive.
        task: Its problem judges by text.
        n_clusters: k of k-means.

    Returns:
        A `RetrievalPolicy` whose first archive is the largest cluster's.

    Raises:
        EvaluationFailed: The problem does not judge by text.
        CorpusUnavailable: There are fewer windows than clusters.
        ModelUnavailable: The sentence encoder can't be had.
    """
    problem, evaluator = task.problem, task.problem.evaluator
    if not isinstance(evaluator, TextEvaluator):
        kind = type(evaluator).__name__
        raise EvaluationFailed(f"clusters of the search text need a search by text (evaluation=text); got {kind}")
    if len(evaluator.windows) < n_clusters:
        raise CorpusUnavailable(
            f"{n_clusters} clusters need as many windows to search on; got {len(evaluator.windows)}"
            " (evaluation.search_windows)"
        )
    vectors = encode_sentences(problem.llm.tokenizer.batch_decode(evaluator.windows))
    labels, centres = k_means(vectors, n_clusters, task.seed)
    sizes = np.bincount(labels)
    largest_first = np.argsort(-sizes, kind="stable")
    results, tokens = [], 0
    for number, label in enumerate(largest_first):
        part = evaluator.part(np.flatnonzero(labels == label))
        asked = sum(result.evaluations for result in results)
        of_cluster = replace(
            task,
            problem=problem.judged_by(part, EvaluationBudget(problem.budget.left)),
            progress=lambda done, total, number=number: task.progress(number * total + done, n_clusters * total),
            log=lambda step, metrics, asked=asked: task.log(asked + step, metrics),
        )
        results.append(search(of_cluster))
        tokens += results[-1].evaluations * part.windows.numel() + results[-1].calibration_tokens
    policy = RetrievalPolicy(problem.shape, [result.policy for result in results], centres[largest_first])
    details = {"windows_of_clusters": sizes[largest_first].tolist()}
    return SearchResult(policy, 0, sum(result.seconds for result in results), details, tokens)
