"""What a search over a family ends as: all answers rest on the same evaluations, cost none, and fit what is asked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.driver import evaluated_masks, run_search
from agents.family_critic import CriticEvaluator
from agents.family_gradient import GradientPolicy
from agents.family_surrogate import FamilySurrogateAgent
from agents.width_scaling import scaled_to_fit
from rap_env.mask import PruningMask
from rap_env.memory.scenario import ScenarioSampler, scenario_grid
from rap_env.policies import ArchivePolicy, WidthPolicy, load_policy, save_policy
from tests.agents.cases import build_agent, decided, fits, make_task
from tests.agents.test_family_surrogate import BETWEEN, Rivals, grouped, score  # noqa: F401 - a fixture

ANSWERS = {
    "family_surrogate_short": ArchivePolicy,
    "family_gradient": WidthPolicy,
    "family_noise": ArchivePolicy,
    "family_ppo": WidthPolicy,
    "family_sac": WidthPolicy,
    "family_td3": WidthPolicy,
    "family_dqn": ArchivePolicy,
    "family_maskable_ppo": ArchivePolicy,
}


class KeepsCritic:
    """An answer that hands the critic over."""

    def policy(self, critic, details):
        self.critic = critic
        return critic.greedy


@pytest.fixture
def critic(grouped):  # noqa: F811
    answer = KeepsCritic()
    run_search(FamilySurrogateAgent(answer=answer), make_task(grouped, 60, Rivals()))
    return answer.critic


@pytest.mark.parametrize(("name", "kind"), ANSWERS.items())
def test_every_answer_rests_on_the_surrogates_evaluations_and_fits(name, kind, grouped, tmp_path):  # noqa: F811
    asked, own = make_task(grouped, 60, Rivals()), make_task(grouped, 60, Rivals())
    run_search(build_agent("family_surrogate"), asked)
    result = run_search(build_agent(name), own)
    assert evaluated_masks(own) == evaluated_masks(asked)
    assert result.tokens == own.problem.budget.spent <= 60
    assert isinstance(result.policy, kind)
    grid = scenario_grid(grouped.shape, *BETWEEN)
    masks = decided(result.policy, grid)
    assert all(fits(mask, grouped.shape, each) for mask, each in zip(masks, grid, strict=True))
    assert decided(load_policy(save_policy(result.policy, tmp_path / "policy")), grid) == masks
    again = run_search(build_agent(name), make_task(grouped, 60, Rivals()))
    assert decided(again.policy, grid) == masks


def test_the_gradient_through_the_critic_is_better_than_equal_widths(grouped):  # noqa: F811
    grid = scenario_grid(grouped.shape, [(2, 300)], [0.85, 0.8, 0.75, 0.7])
    family = ScenarioSampler((2, 2), (300, 300), (0.65, 0.9))
    scores = []
    for steps in (1, 400):
        agent = FamilySurrogateAgent(answer=GradientPolicy(steps, contexts=256, learning_rate=3e-3))
        scores.append(score(run_search(agent, replace(make_task(grouped, 90, Rivals()), sampler=family)).policy, grid))
    assert scores[1] > scores[0] + 0.01


def test_learners_are_told_what_the_critic_predicts_for_nothing(critic):
    task = critic.training_task()
    masks = [
        PruningMask.all_kept(critic.shape).drop("layer0.mlp.48:64"),
        PruningMask.from_widths(critic.shape, [1, 2] * 6),
    ]
    evaluated = task.problem.meter.evaluate(masks)
    assert isinstance(task.problem.evaluator, CriticEvaluator)
    assert np.allclose([-each.score for each in evaluated], critic.logarithms(masks))
    assert task.problem.budget.spent == 0
    assert list(task.importance.static) == list(critic.order(task.scenarios)), "no ranking is measured"


def test_kept_fractions_take_all_bytes_there_are_and_gradients_go_through_the_scaling():
    generator = torch.Generator().manual_seed(0)
    fractions = torch.rand(5, 7, generator=generator, dtype=torch.float64).clamp(min=1e-12).requires_grad_()
    sizes = 1.0 + torch.rand(5, 7, generator=generator, dtype=torch.float64)
    room = sizes.sum(1) * torch.tensor([0.1, 0.4, 0.6, 0.8, 0.95])
    kept = scaled_to_fit(fractions, sizes, room)
    assert torch.allclose((kept * sizes).sum(1), room)
    assert kept.max() <= 1.0 and (kept == 1.0).any()
    weights = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    torch.autograd.gradcheck(lambda each: (scaled_to_fit(each, sizes, room) * weights).sum(), fractions)
