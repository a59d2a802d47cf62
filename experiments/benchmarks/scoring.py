"""Part `scoring`: lm-eval with its own HF adapter at its best batch size against lm-eval with our scoring engine."""

import contextlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import (
    alternate,
    counted,
    forward_flops,
    gemm_flops_per_second,
    in_type,
    speedup,
    timed,
)
from rap_env.evaluation.lm import RapLM
from rap_env.evaluation.scoring import Pair, ScoringPlan
from rap_env.evaluation.tasks import TASKS_FOLDER
from rap_env.llm.switchable import SwitchableLLM
from rap_env.rng import isolated_rng


def _evaluation(options: Mapping[str, Any]) -> Callable[..., dict]:
    """The same call of `simple_evaluate` for every model."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [str(TASKS_FOLDER), *([options["include_path"]] if options["include_path"] else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)

    def evaluate(lm, log_samples: bool = False) -> dict:
        with isolated_rng(0), contextlib.redirect_stderr(io.StringIO()):  # a progress bar for every task
            return simple_evaluate(
                model=lm,
                tasks=options["tasks"],
                task_manager=manager,
                num_fewshot=0,
                limit=options["limit"],
                bootstrap_iters=0,
                log_samples=log_samples,
                verbosity="ERROR",
            )

    return evaluate


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Times both, then compares their results in float32."""
    llm, options, evaluate = bench.llm, bench.options["scoring"], _evaluation(bench.options["evaluation"])
    upstream = bench.upstream(llm)
    step = counted(progress, len(options["plain_batch_sizes"]) + 2 * options["repeats"] + 2)
    plain = {size: _plain(upstream, size) for size in options["plain_batch_sizes"]}
    search_seconds = {size: timed(lambda lm=lm: step(evaluate(lm)))[0] for size, lm in plain.items()}
    best = min(search_seconds, key=search_seconds.__getitem__)
    ours = _Counted(llm)
    seconds, results = alternate(
        {"plain": lambda _: step(evaluate(plain[best])), "ours": lambda _: step(evaluate(ours))}, options["repeats"]
    )
    gemm = gemm_flops_per_second(llm)
    plan = ours.last_plan
    engine = [timed(lambda: next(plan.run(llm, [llm.mask])))[0] for _ in range(options["repeats"])]
    rate = forward_flops(llm, llm.mask, plan.tokens, plan.head_rows) / sorted(engine)[len(engine) // 2]
    return {
        "simple_evaluate": speedup(seconds["plain"], seconds["ours"]),
        "plain_batch_size": best,
        "plain_dtype": str(upstream.dtype),
        "plain_batch_size_seconds": {str(size): taken for size, taken in search_seconds.items()},
        "requests": len(plan.pairs),
        "tokens": plan.tokens,
        "tokens_of_requests": sum(len(context) + len(continuation) - 1 for context, continuation in plan.pairs),
        "head_rows": plan.head_rows,
        "gemm_flops_per_second": gemm,
        "engine_seconds": engine,
        "engine_flops_per_second": rate,
        "engine_share_of_gemm": rate / gemm,
        "results": {name: _accuracies(runs[0]) for name, runs in results.items()},
        "float32": _compare(evaluate, bench.build_llm(dtype="float32"), best, step),
    }


def _plain(llm: SwitchableLLM, batch_size: int) -> HFLM:
    return HFLM(pretrained=llm.model, tokenizer=llm.tokenizer, batch_size=batch_size)


class _Counted(RapLM):
    """Keeps the plan of its last requests, for the record."""

    last_plan: ScoringPlan

    def plan(self, pairs: Sequence[Pair]) -> ScoringPlan:
        self.last_plan = super().plan(pairs)
        return self.last_plan


def _accuracies(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        task: {
            name.partition(",")[0]: value for name, value in metrics.items() if name in ("acc,none", "acc_norm,none")
        }
        for task, metrics in results["results"].items()
        if "acc,none" in metrics
    }


def _compare(evaluate: Callable, llm: SwitchableLLM, batch_size: int, step: Callable) -> dict[str, Any]:
    """Metrics and log-likelihoods of both ways."""
    evaluated = [step(evaluate(lm, log_samples=True)) for lm in (_plain(llm, batch_size), RapLM(llm))]
    accuracies = {name: _accuracies(results) for name, results in zip(("plain", "ours"), evaluated, strict=True)}
    plain, ours = (
        {
            (task, sample["doc_id"], index): response[0]
            for task, samples in results["samples"].items()
            for sample in samples
            for index, response in enumerate(sample["filtered_resps"])
        }
        for results in evaluated
    )
    differences = [abs(float(plain[key]) - float(ours[key])) for key in plain]
    return {
        "accuracies": accuracies,
        "accuracies_equal": accuracies["plain"] == accuracies["ours"],
        "log_likelihoods": len(differences),
        "largest_difference": max(differences),
    }


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    float32 = results["float32"]
    return [
        f"simple_evaluate: {results['simple_evaluate']['ratio']:.2f} times faster than HFLM at batch size"
        f" {results['plain_batch_size']}{in_type(results)};"
        f" {results['tokens']:,} tokens forwarded for {results['tokens_of_requests']:,}",
        f"engine: {results['engine_flops_per_second'] / 1e9:.0f} GFLOP/s,"
        f" {results['engine_share_of_gemm']:.0%} of the GEMM rate",
        f"float32: accuracies equal: {float32['accuracies_equal']}; log-likelihoods differ by at most"
        f" {float32['largest_difference']:.1e} ({float32['log_likelihoods']} of them)",
    ]
