"""The policy that the model's own gradient trains: better than equal widths, within its tokens, and resumable."""

import dataclasses
import statistics

import numpy as np
import pytest
import torch

from agents.driver import run_search
from agents.model_gradient import ModelGradientAgent, _Whitening
from agents.width_scaling import family_inputs
from agents.window_batches import WindowBatches
from rap_env.errors import CorpusUnavailable, InvalidConfig, InvalidReward
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.mixture import MixtureEvaluator
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.evaluation.width_gradients import PASSES, WidthGradients
from rap_env.memory.scenario import ScenarioSampler, scenario_grid
from rap_env.memory.workload import Workload
from rap_env.policies import WidthPolicy, load_policy, save_policy
from rap_env.policies.width import width_features
from rap_env.problem import PruningProblem
from rap_env.rng import isolated_rng
from tests.agents.cases import build_agent, decided, fits, make_task
from tests.agents.test_family_surrogate import BETWEEN, grouped  # noqa: F401 - a fixture

N_WINDOWS, TOKENS = 12, 24
EACH = PASSES * 4 * TOKENS


def written(llm) -> torch.Tensor:
    """Windows [12, 24] that the dense model predicts well: its own text."""
    with isolated_rng(0):
        begun = torch.randint(0, 256, (N_WINDOWS, 1))
        return llm.model.generate(begun, max_length=TOKENS, min_length=TOKENS, do_sample=True, temperature=0.5)


def task_of(llm, limit: int, **options):
    task = make_task(llm, limit, PerplexityEvaluator(written(llm), "text"), **options)
    return dataclasses.replace(task, windows=written(llm))


def searched(llm, steps: float, **options):
    task = task_of(llm, int(steps * EACH), **options)
    return task, run_search(build_agent("model_gradient", batch=4, learning_rate=0.1), task)


def test_steps_lower_the_loss_of_masks_that_fit(grouped, tmp_path):  # noqa: F811
    grid, losses = scenario_grid(grouped.shape, *BETWEEN), []
    for steps in (0, 120):
        _task, result = searched(grouped, steps)
        masks = decided(result.policy, grid)
        assert all(fits(mask, grouped.shape, each) for mask, each in zip(masks, grid, strict=True))
        evaluated = PerplexityEvaluator(written(grouped), "text").evaluate_many(grouped, list(dict.fromkeys(masks)))
        of_masks = {mask: -evaluation.score for mask, evaluation in evaluated}
        losses.append(statistics.mean(of_masks[mask] for mask in masks))
    assert losses[1] < losses[0] - 0.2, losses
    assert isinstance(result.policy, WidthPolicy)
    assert decided(load_policy(save_policy(result.policy, tmp_path / "policy")), grid) == masks


def test_no_step_is_taken_that_the_budget_does_not_pay_for(grouped):  # noqa: F811
    for steps, taken in ((0.9, 0), (2.9, 2)):
        task, result = searched(grouped, steps)
        assert {entry.owner for entry in task.problem.budget.history} <= {"width gradients"}
        assert task.problem.budget.spent == result.tokens == taken * EACH
        assert len(result.details["losses"]) == taken


def test_a_larger_budget_repeats_the_steps_of_a_smaller_one_from_the_store(grouped, tmp_path, monkeypatch):  # noqa: F811
    with ResultStore(tmp_path / "results.db") as store:
        _task, first = searched(grouped, 3, store=store)
        measured = WidthGradients._measured
        fresh = []
        monkeypatch.setattr(WidthGradients, "_measured", lambda *given: fresh.append(1) or measured(*given))
        _task, longer = searched(grouped, 5, store=store)
    assert len(fresh) == 2 and longer.details["losses"][:3] == first.details["losses"]


def test_every_window_is_read_before_any_is_read_again(grouped):  # noqa: F811
    batches = WindowBatches(task_of(grouped, 0), np.random.default_rng(0), answers=0)
    read = torch.cat([batches.draw([""] * 8)[0] for _ in range(3)])
    for epoch in read.split(N_WINDOWS):
        assert sorted(epoch.tolist()) == sorted(written(grouped).tolist())


def test_some_windows_end_with_a_right_answer_that_alone_is_scored(grouped):  # noqa: F811
    recall = HarnessEvaluator("rap_recall_128_search", limit=3)
    task = dataclasses.replace(task_of(grouped, 0), windows=torch.zeros(N_WINDOWS, 1024, dtype=torch.long))
    searched_on = MixtureEvaluator([(task.problem.evaluator, 1.0), (recall, 1.0)])
    task = dataclasses.replace(task, problem=PruningProblem(grouped, searched_on))
    answers = recall.right_answers(grouped)
    batches, seen, places = WindowBatches(task, np.random.default_rng(0), answers=2), [], set()
    for _step in range(12):
        windows, n_scored = batches.draw([""] * 8)
        ends = [place for place, scored in enumerate(n_scored) if scored < 1023]
        assert len(ends) == 2
        places |= set(ends)
        for place in ends:
            ended = tuple(windows[place, -n_scored[place] :].tolist())
            ((context, answer),) = [own for own in answers if own[1] == ended]
            assert windows[place, -len(context) - len(answer) :].tolist() == [*context, *answer]
            assert not windows[place, : -len(context) - len(answer)].any()
            seen.append(answer)
    assert {seen.count(answer) for _context, answer in answers} == {8} and len(places) > 4


def test_a_context_of_a_kind_of_text_is_read_on_a_window_of_that_kind(grouped):  # noqa: F811
    sampler = ScenarioSampler(kinds=["code", "prose"])
    kinds = ["code"] * 6 + ["prose"] * 6
    task = dataclasses.replace(task_of(grouped, 0), sampler=sampler, window_kinds=kinds)
    of_kind = dict(zip(map(tuple, written(grouped).tolist()), kinds, strict=True))
    batches = WindowBatches(task, np.random.default_rng(0), answers=0)
    asked = ["code", "code", "prose", "code"]
    read = [tuple(window) for _step in range(4) for window in batches.draw(asked)[0].tolist()]
    assert [of_kind[window] for window in read] == asked * 4
    assert {read.count(window) for window in of_kind if of_kind[window] == "code"} == {2}
    with pytest.raises(CorpusUnavailable, match="expected calibration text of each kind of workloads; none is of code"):
        WindowBatches(dataclasses.replace(task, window_kinds=()), np.random.default_rng(0), answers=0)


@pytest.mark.parametrize(("blind_to", "n_masks"), [([], 2), (["kind"], 1)])
def test_it_learns_masks_for_each_kind_unless_it_is_blind_to_them(grouped, blind_to, n_masks):  # noqa: F811
    text = written(grouped)
    task = dataclasses.replace(
        task_of(grouped, 20 * EACH),
        sampler=ScenarioSampler((1, 16), (128, 2048), (0.5, 0.95), kinds=["own", "noise"]),
        windows=torch.cat([text, torch.randint(0, 256, text.shape, generator=torch.Generator().manual_seed(0))]),
        window_kinds=["own"] * N_WINDOWS + ["noise"] * N_WINDOWS,
    )
    agent = build_agent("model_gradient", batch=4, learning_rate=0.1, blind_to=blind_to)
    policy = run_search(agent, task).policy
    scenario = scenario_grid(grouped.shape, [(4, 512)], [0.7])[0]
    found = {policy.decide(Workload(4, 512, kind=kind), scenario.budget_bytes) for kind in ("own", "noise")}
    assert len(found) == n_masks


@pytest.mark.parametrize("answers", [-1, 9])
def test_no_more_answers_than_windows(answers):
    with pytest.raises(InvalidConfig, match=f"expected 0 to 8, the windows of a step; got {answers}"):
        ModelGradientAgent(answers=answers)


def test_answers_need_items(grouped):  # noqa: F811
    with pytest.raises(InvalidReward, match="text has none"):
        run_search(ModelGradientAgent(answers=1), task_of(grouped, EACH))


@pytest.mark.parametrize("kinds", [(), ("code", "prose", "chats")])
def test_whitened_observations_have_unit_variance_and_a_way_back_and_kinds_stay(grouped, kinds):  # noqa: F811
    sampler = ScenarioSampler((1, 16), (128, 2048), (0.5, 0.95), kinds=kinds)
    points = torch.rand(300, sampler.n_dimensions, generator=torch.Generator().manual_seed(0)).tolist()
    contexts = [sampler.at(grouped.shape, point) for point in points]
    features = width_features(family_inputs(grouped.shape, contexts, kinds)[0])
    whitening = _Whitening(features.double(), len(kinds))
    seen = whitening(features)
    n_others = whitening.rank - len(kinds)
    others = seen[:, :n_others]
    assert 2 <= n_others <= 4
    assert torch.allclose(others.T @ others / len(seen), torch.eye(n_others, dtype=torch.float64), atol=1e-6)
    for place, kind in enumerate(kinds, n_others):
        assert seen[:, place].tolist() == [float(each.workload.kind == kind) for each in contexts]
    linear = torch.nn.Linear(whitening.rank, 5, dtype=torch.float64)
    weight, bias = whitening.undone(linear)
    assert torch.allclose(linear(seen), features.double() @ weight.T + bias, atol=1e-6)
