"""Runtime-adaptive pruning of large language models with reinforcement learning."""

import importlib

import gymnasium

from rap_env.components import Component
from rap_env.errors import InfeasibleBudget, RapError
from rap_env.mask import PruningMask
from rap_env.memory.footprint import Footprint, footprint
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload

# Public names that need PyTorch, transformers or SQLAlchemy, by their modules: imported when they are first used.
_ON_FIRST_USE = {
    "ModelShape": "rap_env.llm.shape",
    "Outcome": "rap_env.problem",
    "PruningProblem": "rap_env.problem",
    "Reranker": "rap_env.rerank.reranker",
    "ResultStore": "rap_env.evaluation.store",
    "greedy_sequential_importance": "rap_env.importance.gsi",
    "load_llm": "rap_env.llm.loading",
    "load_policy": "rap_env.policies",
}
__all__ = [
    "Component",
    "Footprint",
    "InfeasibleBudget",
    "ModelShape",
    "Outcome",
    "PruningMask",
    "PruningProblem",
    "RapError",
    "Reranker",
    "ResultStore",
    "Scenario",
    "Workload",
    "footprint",
    "greedy_sequential_importance",
    "load_llm",
    "load_policy",
]


def __getattr__(name: str) -> object:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_ON_FIRST_USE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_ON_FIRST_USE))


gymnasium.register(
    "rap/Pruning-v0",
    entry_point="rap_env.envs.pruning:PruningEnv",
    vector_entry_point="rap_env.envs.vector:PruningVectorEnv",
)
gymnasium.register(
    "rap/SequentialPruning-v0",
    entry_point="rap_env.envs.sequential:SequentialPruningEnv",
    vector_entry_point="rap_env.envs.vector:SequentialPruningVectorEnv",
)
gymnasium.register(
    "rap/Width-v0",
    entry_point="rap_env.envs.width:WidthEnv",
    vector_entry_point="rap_env.envs.vector:WidthVectorEnv",
)
gymnasium.register("rap/Serving-v0", entry_point="rap_env.envs.serving:ServingEnv")
gymnasium.register("rap/Selection-v0", entry_point="rap_env.envs.selection:SelectionEnv")
