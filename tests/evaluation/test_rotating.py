"""Each mask is read on a part of its own, relative to the dense model there; the same mask always on the same part."""

import pytest
import torch

from rap_env.errors import InvalidConfig
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.rotating import RotatingEvaluator
from rap_env.mask import PruningMask
from tests.evaluation.test_perplexity import random_masks


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [PerplexityEvaluator, DivergenceEvaluator])
def test_a_score_is_the_dense_models_plus_what_the_mask_changes_on_its_part(tiny_llm, windows, kind):
    rotating, dense = RotatingEvaluator(kind(windows, "toy"), 3), PruningMask.all_kept(tiny_llm.shape)
    parts = [kind(windows[first : first + 2], "toy") for first in (0, 2, 4)]
    masks = list(dict.fromkeys([dense, *random_masks(tiny_llm.shape, 12)]))
    of_dense = [dict(part.evaluate_many(tiny_llm, [dense]))[dense].score for part in parts]
    measured, seen = dict(rotating.evaluate_many(tiny_llm, masks)), set()
    assert measured.keys() == set(masks)
    for mask, evaluation in measured.items():
        seen.add(index := rotating.part_of(mask))
        own = dict(parts[index].evaluate_many(tiny_llm, [mask]))[mask].score
        assert evaluation.score == pytest.approx(sum(of_dense) / 3 + own - of_dense[index], abs=1e-6)
        assert evaluation.tasks["toy"]["items"] == 2 and evaluation.tokens == 24
    assert seen == {0, 1, 2}
    assert measured[dense].score == pytest.approx(
        dict(kind(windows, "toy").evaluate_many(tiny_llm, [dense]))[dense].score
    )
    alone = [dict(rotating.evaluate_many(tiny_llm, [mask]))[mask] for mask in masks]
    assert [each.score for each in alone] == [measured[mask].score for mask in masks]


def test_an_evaluation_costs_a_part_and_the_dense_model_is_read_once_on_all(tiny_llm, windows):
    inner = PerplexityEvaluator(windows, "toy")
    rotating = RotatingEvaluator(inner, 3)
    assert (rotating.tokens(tiny_llm), rotating.setup_tokens) == (24, 72)
    identities = [inner.identity, rotating.identity, RotatingEvaluator(inner, 2).identity]
    assert all(identities.count(each) == 1 for each in identities)


def test_windows_that_cannot_be_cut_into_equal_parts_are_refused(windows):
    with pytest.raises(InvalidConfig, match="cut into equal parts; got 6 and 4"):
        RotatingEvaluator(PerplexityEvaluator(windows, "toy"), 4)
