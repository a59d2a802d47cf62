"""Kinds of text that are told apart: one evaluation of a mask, and for each workload the score of its own kind."""

import pytest
import torch

from rap_env.errors import InvalidReward, UnknownName
from rap_env.evaluation.mixture import KindsEvaluator
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.workload import Workload
from rap_env.problem import PruningProblem
from tests.conftest import TOY_WINDOWS


@pytest.fixture(scope="module")
def of_kinds():
    return {
        "code": PerplexityEvaluator(TOY_WINDOWS, "sources"),
        "prose": PerplexityEvaluator(torch.flip(TOY_WINDOWS, (0, 1)), "articles"),
    }


def case(llm, mask: PruningMask, kind: str) -> tuple[PruningMask, Workload, int]:
    workload = Workload(2, 100, kind=kind)
    return mask, workload, dense_bytes(llm.shape, workload)


def test_a_workload_is_worth_what_its_own_kind_says(tiny_llm, of_kinds, tmp_path):
    dense = PruningMask.all_kept(tiny_llm.shape)
    masks = [dense, dense.drop("layer0.mlp")]
    alone = {kind: dict(each.evaluate_many(tiny_llm, masks)) for kind, each in of_kinds.items()}
    with ResultStore(tmp_path / "results.db") as store:
        for known in (False, True):  # measured, and from the store
            problem = PruningProblem(tiny_llm, KindsEvaluator(of_kinds), store, {"perplexity_ratio": 1.0})
            for mask in masks:
                told = {kind: problem.evaluate(*case(tiny_llm, mask, kind)) for kind in ("code", "prose", "")}
                for kind in of_kinds:
                    assert told[kind].evaluation == alone[kind][mask]
                    assert told[kind].dense_score == alone[kind][dense].score
                assert told[""].score == pytest.approx((told["code"].score + told["prose"].score) / 2, abs=1e-12)
                assert problem.reward_within_budget(problem.known(mask)) == problem.reward(told[""])
            assert problem.meter.fresh_evaluations == (0 if known else 2), "one evaluation tells about all kinds"


def test_where_kinds_are_not_told_apart_a_workloads_kind_changes_nothing(tiny_llm, of_kinds):
    problem, dense = PruningProblem(tiny_llm, of_kinds["code"]), PruningMask.all_kept(tiny_llm.shape)
    assert problem.evaluate(*case(tiny_llm, dense, "poems")) == problem.evaluate(*case(tiny_llm, dense, ""))


def test_a_kind_that_is_not_known_is_refused_before_anything_is_evaluated(tiny_llm, of_kinds):
    problem = PruningProblem(tiny_llm, KindsEvaluator(of_kinds))
    with pytest.raises(UnknownName, match="kind of text 'poems'; did you mean prose"):
        problem.evaluate(*case(tiny_llm, PruningMask.all_kept(tiny_llm.shape), "poems"))
    assert not problem.meter.known
    with pytest.raises(InvalidReward, match="an evaluator for each kind of text; got none"):
        KindsEvaluator({})


def test_a_part_of_the_data_is_that_part_of_every_kind(tiny_llm, of_kinds):
    whole = KindsEvaluator(of_kinds)
    half = whole.first(0.5)
    assert half.kinds == whole.kinds and half.identity != whole.identity
    assert half.tokens(tiny_llm) == whole.tokens(tiny_llm) / 2 == TOY_WINDOWS.numel()
    assert KindsEvaluator(dict(list(of_kinds.items())[:1])).identity != whole.identity
