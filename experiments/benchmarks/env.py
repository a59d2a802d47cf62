"""Part `env`: a vector environment against single environments in turn, and an environment's own time."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch

from experiments.benchmarks.bench import Bench
from experiments.benchmarks.timing import alternate, counted, speedup, timed
from rap_env.components import MLP
from rap_env.importance.source import ImportanceSource
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.policies.walk import fit_to_budget
from rap_env.problem import PruningProblem

_NAME = "rap/Pruning-v0"
_STORED_STEPS = 2000


def measure(bench: Bench, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Steps on masks that nobody has evaluated yet, then on one that is known."""
    llm, evaluator, importance = bench.llm, bench.evaluator, ImportanceSource(bench.order)
    n, repeats = bench.options["env"]["environments"], bench.options["env"]["repeats"]
    step, results = counted(progress, 2 * 2 * repeats), {}
    evaluator.evaluate(llm)  # encodes the requests

    def fresh() -> dict[str, Any]:
        """Arguments of environments without a store: every mask is fresh."""
        return {"problem": PruningProblem(llm, evaluator), "importance": importance}

    for name, actions_of in (("random_bits", _random_bits), ("projected_bits", _projected_bits)):
        ways = {
            "plain": lambda repeat, actions_of=actions_of: step(_in_turn(fresh(), n, repeat, actions_of)),
            "ours": lambda repeat, actions_of=actions_of: step(_together(fresh(), n, repeat, actions_of)),
        }
        seconds, rewards = alternate(ways, repeats)
        results[name] = {
            "speedup": speedup(seconds["plain"], seconds["ours"]),
            "identical": rewards["plain"] == rewards["ours"],
        }
    tokens = evaluator.plan(llm).tokens
    return results | {
        "concatenated": _concatenated(llm, tokens, n, repeats),
        "stored": _stored(fresh(), n),
        "tokens": tokens,
    }


def _random_bits(env, scenario, rng: np.random.Generator) -> np.ndarray:
    """Every component kept with probability 3/4."""
    return (rng.random(env.action_space.n) < 0.75).astype(np.int8)


def _projected_bits(env, scenario, rng: np.random.Generator) -> np.ndarray:
    """What a one-step agent sends when its training begins: random wishes, projected onto the budget."""
    wish = PruningMask.from_bits(env.shape, _random_bits(env, scenario, rng))
    mask = fit_to_budget(wish, env.shape, env.importance.static, scenario.workload, scenario.budget_bytes)
    return np.array(mask.keep, dtype=np.int8)


def _together(arguments: dict, n: int, repeat: int, actions_of: Callable) -> list[float]:
    envs = gymnasium.make_vec(_NAME, num_envs=n, vectorization_mode="vector_entry_point", **arguments)
    envs.reset(seed=repeat * n)
    rng = np.random.default_rng(repeat)
    actions = np.stack([actions_of(env, env.scenario, rng) for env in envs.unwrapped.envs])
    return envs.step(actions)[1].tolist()


def _in_turn(arguments: dict, n: int, repeat: int, actions_of: Callable) -> list[float]:
    rng, rewards = np.random.default_rng(repeat), []
    for index in range(n):
        env = gymnasium.make(_NAME, **arguments)
        _observation, info = env.reset(seed=repeat * n + index)
        rewards.append(env.step(actions_of(env.unwrapped, info["scenario"], rng))[1])
    return rewards


def _concatenated(llm: SwitchableLLM, tokens: int, n: int, repeats: int) -> dict[str, Any]:
    """What running all masks' streams through a site as one would gain: an MLP on N times as many tokens."""
    mlp = [site for site in llm.shape.sites if site.kind == MLP][:1]
    stream = torch.randn(1, tokens, llm.shape.hidden_size).to(llm.device, llm.dtype)
    streams = stream.expand(n, -1, -1).reshape(1, n * tokens, -1)
    ways = {
        "plain": lambda _: [llm.run(mlp, stream, {}) for _ in range(n)],
        "ours": lambda _: llm.run(mlp, streams, {}),
    }
    alternate(ways, 1)  # the first calls allocate
    seconds, _results = alternate(ways, 5 * repeats)
    return speedup(seconds["plain"], seconds["ours"])


def _stored(arguments: dict[str, Any], n: int) -> dict[str, Any]:
    """Microseconds of an episode (reset and step) whose mask is known, alone and in a vector environment."""
    env = gymnasium.make(_NAME, **arguments)
    known = np.ones(env.action_space.n, dtype=np.int8)
    env.reset(seed=0)
    env.step(known)
    times = {"reset": [], "step": []}
    for _ in range(_STORED_STEPS):
        times["reset"].append(timed(env.reset)[0])
        times["step"].append(timed(lambda: env.step(known))[0])
    envs = gymnasium.make_vec(_NAME, num_envs=n, vectorization_mode="vector_entry_point", **arguments)
    envs.reset(seed=0)
    actions = np.stack([known] * n)
    vector = [timed(lambda: envs.step(actions))[0] / n for _ in range(_STORED_STEPS // n)]
    return {
        "reset_microseconds": float(np.median(times["reset"]) * 1e6),
        "step_microseconds": float(np.median(times["step"]) * 1e6),
        "vector_step_microseconds": float(np.median(vector) * 1e6),
        "steps": _STORED_STEPS,
    }


def lines(results: dict[str, Any]) -> list[str]:
    """What is printed."""
    stored = results["stored"]
    return [
        *(
            f"{name.replace('_', ' ')}: {results[name]['speedup']['ratio']:.2f} times faster than single environments,"
            f" identical: {results[name]['identical']}"
            for name in ("random_bits", "projected_bits")
        ),
        f"one stream of {results['tokens']:,} tokens for each mask, or all of them as one: MLPs"
        f" {results['concatenated']['ratio']:.2f} times faster as one",
        f"known mask: reset {stored['reset_microseconds']:.0f} us, step {stored['step_microseconds']:.0f} us;"
        f" in a vector environment {stored['vector_step_microseconds']:.0f} us for each (reset included)",
    ]
