"""The predictor knows what it was given, and how little it knows of the rest."""

import itertools

import numpy as np
import pytest

from rap_env.evaluation.predictor import ScorePredictor
from rap_env.mask import PruningMask
from tests.agents.cases import interacting


@pytest.fixture(scope="module")
def all_masks(tiny_llm) -> list[PruningMask]:
    return [PruningMask.from_bits(tiny_llm.shape, bits) for bits in itertools.product((0, 1), repeat=8)]


def test_a_quarter_of_all_masks_predicts_the_others(all_masks):
    chosen = np.random.default_rng(0).permutation(len(all_masks))[:64]
    evaluated = {all_masks[index]: interacting(all_masks[index].keep) for index in chosen}
    others = [mask for mask in all_masks if mask not in evaluated]
    truth = np.array([interacting(mask.keep) for mask in others])
    predictor = ScorePredictor(evaluated)
    errors = np.abs(predictor.predict(others) - truth)
    assert errors.mean() < 0.15 * np.abs(truth - truth.mean()).mean()
    assert predictor.predict(list(evaluated)) == pytest.approx(list(evaluated.values()), abs=0.02)
    assert 0.3 < predictor.leave_one_out_error / np.abs(np.log1p(errors)).mean() < 3
    again = ScorePredictor(evaluated, settled=predictor)
    assert again.predict(others) == pytest.approx(predictor.predict(others), abs=1e-6)


def test_improvement_is_expected_of_what_is_thought_better_or_not_known(all_masks):
    evaluated = {mask: interacting(mask.keep) for mask in all_masks[::9]}
    predictor = ScorePredictor(evaluated)
    gains = np.array([predictor.expected_improvement(all_masks, score) for score in (-0.2, 0.2, 0.6)])
    assert gains.min() >= 0.0 and np.all(np.diff(gains, axis=0) <= 1e-9)
    least = predictor.expected_improvement(all_masks, -20.0)  # everything betters it: only the means count
    assert np.argsort(least)[-5:].tolist() == np.argsort(predictor.predict(all_masks))[-5:].tolist()
    best = max(evaluated, key=evaluated.get)
    others = [mask for mask in all_masks if mask not in evaluated]
    known, *unknown = predictor.expected_improvement([best, *others], evaluated[best])
    assert known < max(unknown)


def test_cautious_predictions_are_below_the_plain_ones_most_where_least_is_known(all_masks):
    evaluated = {mask: interacting(mask.keep) for mask in all_masks[::9]}
    predictor = ScorePredictor(evaluated)
    cost = {name: np.log1p(1.0 - getattr(predictor, name)(all_masks)) for name in ("cautious", "predict")}
    caution = dict(zip(all_masks, cost["cautious"] - cost["predict"], strict=True))
    assert min(caution.values()) > 0.0
    assert max(caution[mask] for mask in evaluated) < 0.2 * np.mean([caution[mask] for mask in all_masks])


def test_losses_of_a_ranking_help_where_they_say_something(all_masks):
    evaluated = {mask: interacting(mask.keep) for mask in all_masks[::9]}
    others = [mask for mask in all_masks if mask not in evaluated]
    truth = np.array([interacting(mask.keep) for mask in others])

    def error(losses) -> float:
        return float(np.abs(ScorePredictor(evaluated, losses=losses).predict(others) - truth).mean())

    measured = {mask: 5.0 - 2.0 * interacting(mask.keep) for mask in all_masks[::2]}
    alone = error(None)
    assert error(measured) < 0.7 * alone
    noise = np.random.default_rng(0).normal(0.0, 0.02, len(measured))
    assert error({mask: loss + off for (mask, loss), off in zip(measured.items(), noise, strict=True)}) < alone
    useless = [{mask: -loss for mask, loss in measured.items()}, {mask: 1.0 for mask in measured}]
    useless.append({mask: measured[mask] for mask in [mask for mask in measured if mask in evaluated][:2]})
    assert [error(losses) for losses in useless] == [alone] * 3


def test_leaving_one_out_is_what_fitting_without_it_says(all_masks):
    evaluated = {mask: interacting(mask.keep) for mask in all_masks[::9]}
    predictor = ScorePredictor(evaluated)
    best, errors = max(evaluated.values()), []
    for mask, score in evaluated.items():
        rest = {other: value for other, value in evaluated.items() if other != mask}
        if max(rest.values()) == best:  # the process is fitted to what lies below the best
            predicted = ScorePredictor(rest, settled=predictor).predict([mask])[0]
            errors.append(abs(np.log1p(best - predicted) - np.log1p(best - score)))
    assert predictor.leave_one_out_error == pytest.approx(np.mean(errors), rel=0.25)


def test_one_mask_is_not_enough_to_predict_from(all_masks):
    with pytest.raises(ValueError, match="at least two evaluated masks; got 1"):
        ScorePredictor({all_masks[0]: 1.0})
