"""A mixture scores by the weighted sum of its parts, and tells the tasks of all of them."""

import json

import pytest
import torch

from rap_env.errors import InvalidReward
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.mixture import MixtureEvaluator
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.mask import PruningMask
from tests.conftest import TOY_WINDOWS

RECALL = "rap_recall_128_search"


@pytest.fixture(scope="module")
def parts():
    return PerplexityEvaluator(TOY_WINDOWS, "text"), HarnessEvaluator(RECALL, limit=2, metric="smooth_acc")


def test_the_score_is_the_weighted_sum_and_all_tasks_are_told(tiny_llm, parts):
    dense = PruningMask.all_kept(tiny_llm.shape)
    masks = [dense, dense.drop("layer0.mlp"), dense.drop("layer1.attention")]
    mixture = MixtureEvaluator([(parts[0], 1.0), (parts[1], 0.5)])
    found = dict(mixture.evaluate_many(tiny_llm, masks))
    text, recall = (dict(part.evaluate_many(tiny_llm, masks)) for part in parts)
    assert list(found) and found.keys() == set(masks)
    for mask, evaluation in found.items():
        assert evaluation.score == pytest.approx(text[mask].score + 0.5 * recall[mask].score, abs=1e-12)
        assert evaluation.tasks == {**text[mask].tasks, **recall[mask].tasks}
        assert evaluation.tokens == mixture.tokens(tiny_llm) == sum(part.tokens(tiny_llm) for part in parts)


def test_its_first_part_is_that_of_its_parts_and_another_evaluator(tiny_llm, parts):
    mixture = MixtureEvaluator([(part, 1.0) for part in parts])
    half = mixture.first(0.5)
    assert half.tokens(tiny_llm) == sum(part.first(0.5).tokens(tiny_llm) for part in parts)
    weighted = MixtureEvaluator([(parts[0], 1.0), (parts[1], 2.0)])
    assert len({str(each.identity) for each in (mixture, half, weighted)}) == 3
    assert json.dumps(MixtureEvaluator([(part, 1) for part in parts]).identity) == json.dumps(mixture.identity)


def test_right_answers_are_those_of_the_items(tiny_llm, parts):
    answers = MixtureEvaluator([(part, 1.0) for part in parts]).right_answers(tiny_llm)
    decode = tiny_llm.tokenizer.decode
    texts = [decode([*context, *answer]).strip() for context, answer in answers]
    assert texts == parts[1].item_texts[RECALL] and all(answer for _context, answer in answers)
    assert parts[0].right_answers(tiny_llm) == ()


def test_what_can_not_be_mixed_is_refused(tiny_llm, parts):
    with pytest.raises(InvalidReward, match="two evaluators or more"):
        MixtureEvaluator([(parts[0], 1.0)])
    with pytest.raises(InvalidReward, match=r"above 0; got \[1.0, 0.0\]"):
        MixtureEvaluator([(parts[0], 1.0), (parts[1], 0.0)])
    other = PerplexityEvaluator(torch.flip(TOY_WINDOWS, (0,)), "text")
    with pytest.raises(InvalidReward, match="two have text"):
        MixtureEvaluator([(parts[0], 1.0), (other, 1.0)]).evaluate(tiny_llm)
