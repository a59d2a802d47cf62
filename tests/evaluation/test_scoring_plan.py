"""A plan forwards each context as rarely, and computes as few logits, as the requests and the token limit allow."""

import itertools
import random

import pytest
import torch

from rap_env.errors import EvaluationFailed
from rap_env.evaluation import scoring
from rap_env.evaluation.scoring import ScoringPlan, fit_to_context
from rap_env.llm.packing import TokenTree
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from tests.evaluation.scoring_cases import score_continuations


@pytest.fixture
def batches(monkeypatch) -> list[list[TokenTree]]:
    """The trees of each batch that any model forwards."""
    recorded, open_packed = [], SwitchableLLM.open_packed

    def record(self, trees):
        recorded.append(list(trees))
        return open_packed(self, trees)

    monkeypatch.setattr(SwitchableLLM, "open_packed", record)
    return recorded


@torch.inference_mode()
def score_alone(llm, context, continuation) -> float:
    logprobs = llm.model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(context) + i - 1, token].item() for i, token in enumerate(continuation))


def assert_scores_are_right(llm, pairs, batch_tokens: int = 4096) -> None:
    scores = [score for score, _ in score_continuations(llm, pairs, batch_tokens)]
    assert scores == pytest.approx([score_alone(llm, *pair) for pair in pairs], abs=1e-4)


def random_items(n: int) -> list:
    """Contexts of 1 to 15 tokens, each with 1 to 6 choices of 1 to 12 tokens."""
    rng = random.Random(0)

    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(rng.randint(1, longest)))

    return [(context, tokens(12)) for context in [tokens(15) for _ in range(n)] for _ in range(rng.randint(1, 6))]


def test_choices_share_their_context_and_the_logits_behind_it(tiny_llm, batches):
    pairs = [
        ((1, 2), (3,)),  # a choice of one token is predicted from its context alone
        ((1, 2), (4,)),
        ((1, 2), (3, 4)),  # forwards 3
        ((1, 2), (5, 6, 7)),  # forwards 5 and 6
        ((1, 2, 3), (9,)),
        ((5,), (6, 7)),  # forwards 6
    ]
    plan = ScoringPlan(pairs)
    assert plan.tokens == (2 + 1 + 2) + 3 + (1 + 1)
    assert plan.head_rows == (1 + 1 + 2) + 1 + (1 + 1)  # a context's last position, and each token of a branch
    assert_scores_are_right(tiny_llm, pairs)
    assert batches == [
        [TokenTree((5,), ((6,),)), TokenTree((1, 2, 3)), TokenTree((1, 2), ((3,), (5, 6)))],
    ]


def test_continuations_that_differ_in_their_last_token_share_everything(tiny_llm):
    pairs = [((1, 2), (7, 8, last)) for last in range(20)]
    plan = ScoringPlan(pairs)
    assert (plan.tokens, plan.head_rows) == (2 + 2, 1 + 2)
    assert_scores_are_right(tiny_llm, pairs)


def test_as_many_tokens_and_logits_are_computed_as_the_plan_says(tiny_llm, monkeypatch):
    rows, tokens, logits, open_stream = [], [], SwitchableLLM.logits, SwitchableLLM.open_stream

    def count_rows(self, hidden):
        rows.append(hidden.shape.numel() // hidden.shape[-1])
        return logits(self, hidden)

    def count_tokens(self, input_ids, **inputs):
        tokens.append(input_ids.numel())
        return open_stream(self, input_ids, **inputs)

    monkeypatch.setattr(SwitchableLLM, "logits", count_rows)
    monkeypatch.setattr(SwitchableLLM, "open_stream", count_tokens)
    plan, dense = ScoringPlan(random_items(20), 200), PruningMask.all_kept(tiny_llm.shape)
    masks = [dense, dense.drop("layer0.mlp"), dense.drop("layer3.mlp")]
    assert len(list(plan.run(tiny_llm, masks))) == 3
    assert sum(tokens) == plan.tokens, "embedded once for all masks"
    assert len(tokens) == plan.batches > 1
    assert sum(rows) == 3 * plan.head_rows
    assert max(rows) <= scoring._HEAD_ROWS


def test_duplicates_cost_nothing_and_score_the_same(tiny_llm):
    pairs = random_items(6)
    plan, repeated = ScoringPlan(pairs), ScoringPlan(pairs + pairs[::-1])
    assert (repeated.tokens, repeated.head_rows) == (plan.tokens, plan.head_rows)
    expected = score_continuations(tiny_llm, pairs)
    assert score_continuations(tiny_llm, pairs + pairs[::-1]) == expected + expected[::-1]


def test_a_context_is_repeated_before_its_branches_outgrow_it_too_far(tiny_llm, batches, monkeypatch):
    monkeypatch.setattr(scoring, "_BRANCHING", 3)
    # 3 x 2 tokens of branches fit behind a copy of the context: two branches of 3, but not one of 3 and one of 4.
    branches = [(n, n, n) for n in range(10, 15)] + [(20, 20, 20, 20)]
    pairs = [((1, 2), (*branch, 0)) for branch in branches] + [((1, 2), (9,))]
    plan = ScoringPlan(pairs)
    assert plan.tokens == 2 * (2 + 3 + 3) + (2 + 3) + (2 + 4)
    assert_scores_are_right(tiny_llm, pairs)
    trees = [tree for batch in batches for tree in batch]
    assert sorted(len(tree) for tree in trees) == [5, 6, 8, 8]
    assert all(sum(map(len, tree.branches)) <= 3 * len(tree.context) for tree in trees)


def test_a_branch_that_outgrows_its_context_by_itself_gets_a_copy_of_its_own(tiny_llm, batches):
    long = tuple(range(100, 100 + scoring._BRANCHING + 1))
    pairs = [((1,), (*long, 0)), ((1,), (2, 3)), ((1,), (*long[::-1], 0)), ((1,), (4,))]
    assert ScoringPlan(pairs).tokens == 2 * (1 + len(long)) + (1 + 1)
    assert_scores_are_right(tiny_llm, pairs)
    assert sorted(len(tree.branches) for tree in batches[0]) == [1, 1, 1]


@pytest.mark.parametrize("batch_tokens", [1, 7, 16, 27, 50, 333, 4096])
def test_a_batch_exceeds_the_limit_only_if_one_request_does(tiny_llm, batches, batch_tokens):
    pairs = random_items(30)
    plan = ScoringPlan(pairs, batch_tokens)
    assert_scores_are_right(tiny_llm, pairs, batch_tokens)
    sizes = [sum(map(len, batch)) for batch in batches]
    assert (sum(sizes), len(sizes)) == (plan.tokens, plan.batches)
    for batch, size in zip(batches, sizes, strict=True):
        assert size <= batch_tokens or (len(batch) == 1 and len(batch[0].branches) <= 1)
    assert all(size + len(following[0]) > batch_tokens for size, following in zip(sizes, batches[1:], strict=False))


def test_the_lengths_of_trees_never_fall_so_that_equal_ones_lie_side_by_side(tiny_llm, batches):
    score_continuations(tiny_llm, random_items(30), batch_tokens=100)
    lengths = [len(tree) for tree in itertools.chain(*batches)]
    assert len(batches) > 3 and lengths == sorted(lengths)


def test_a_shared_context_is_repeated_rather_than_the_token_limit_exceeded(tiny_llm, batches):
    context = tuple(range(10))
    pairs = [(context, (*range(n, n + 5), 0)) for n in range(100, 160, 10)]  # six branches of 5 tokens
    assert_scores_are_right(tiny_llm, pairs, batch_tokens=20)
    assert [[len(tree) for tree in batch] for batch in batches] == [[20], [20], [20]]


def test_no_requests_make_an_empty_plan(tiny_llm, batches):
    plan = ScoringPlan([])
    assert (plan.tokens, plan.batches, plan.head_rows) == (0, 0, 0)
    assert score_continuations(tiny_llm, []) == [] and batches == []


def test_a_context_is_cut_from_the_left_to_what_the_model_takes():
    context, continuation = [1, 2, 3, 4, 5], [6, 7, 8]
    assert fit_to_context(context, continuation, 7) == ((1, 2, 3, 4, 5), (6, 7, 8))  # 8 is predicted, never read
    assert fit_to_context(context, continuation, 6) == ((2, 3, 4, 5), (6, 7, 8))
    assert fit_to_context(context, continuation, 3) == ((5,), (6, 7, 8))  # one token is always left
    with pytest.raises(EvaluationFailed, match="its continuation has 3 tokens; the model takes at most 2"):
        fit_to_context(context, continuation, 2)


def test_a_pair_without_context_or_continuation_is_refused():
    with pytest.raises(EvaluationFailed, match="its context has no tokens"):
        fit_to_context([], [1], 8)
    with pytest.raises(EvaluationFailed, match="its continuation has no tokens; a token may span its join"):
        fit_to_context([1], [], 8)
    for pair in (((), (1,)), ((1,), ())):
        with pytest.raises(AssertionError):
            ScoringPlan([pair])
