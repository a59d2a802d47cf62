"""Runtime-adaptive pruning of large language models with reinforcement learning."""

import gymnasium

from rap_env.errors import InfeasibleBudget, RapError
from rap_env.evaluation.store import ResultStore
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.llm.loading import load_llm
from rap_env.llm.shape import ModelShape
from rap_env.mask import Component, PruningMask
from rap_env.memory.footprint import Footprint, footprint
from rap_env.memory.scenario import Scenario
from rap_env.memory.workload import Workload
from rap_env.policies import load_policy
from rap_env.problem import Outcome, PruningProblem

__all__ = [
    "Component",
    "Footprint",
    "InfeasibleBudget",
    "ModelShape",
    "Outcome",
    "PruningMask",
    "PruningProblem",
    "RapError",
    "ResultStore",
    "Scenario",
    "Workload",
    "footprint",
    "greedy_sequential_importance",
    "load_llm",
    "load_policy",
]

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
