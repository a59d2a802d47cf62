"""Log-likelihoods equal those of one plain forward for each request, however the requests are batched."""

import random

import pytest
import torch

from rap_env.evaluation import scoring
from rap_env.evaluation.scoring import forwarded_inputs, score_continuations
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask

SHARED = (7, 8, 9)


def random_pairs(n: int) -> list:
    rng = random.Random(0)

    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(rng.randint(1, longest)))

    return [(tokens(20), tokens(6)) for _ in range(n)]


PAIRS = [
    *random_pairs(25),
    *((SHARED, (choice,)) for choice in (1, 2, 3, 255)),  # choices of one token over one context
    (SHARED, (1,)),  # a duplicate
    (SHARED, (1, 2)),
    ((7, 8), (9, 1)),  # the same tokens, split elsewhere
    ((5,), (6,)),
    ((5,), tuple(range(100, 140))),
]


@pytest.fixture(scope="module", params=["llama", "opt"])
def llm(request):
    return build_tiny_llm(request.param)


@pytest.fixture(params=[(), ("layer0.attention", "layer2.mlp")], ids=["dense", "pruned"])
def mask(request, llm) -> PruningMask:
    return PruningMask.all_kept(llm.shape).drop(*request.param)


@torch.inference_mode()
def score_alone(model, context, continuation) -> tuple[float, bool]:
    """One request by upstream's plain forward, without padding, batching or sharing."""
    logprobs = model(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    total, is_greedy = 0.0, True
    for offset, token in enumerate(continuation):
        row = logprobs[len(context) + offset - 1]
        total += row[token].item()
        is_greedy = is_greedy and row.argmax().item() == token
    return total, is_greedy


@torch.inference_mode()
def greedy_continuation(model, context, length: int) -> tuple[int, ...]:
    tokens = list(context)
    for _ in range(length):
        tokens.append(model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    return tuple(tokens[len(context) :])


def test_scores_equal_one_plain_forward_for_each_request(llm, mask):
    with llm.pruned(mask):
        scores = score_continuations(llm, PAIRS)
        expected = [score_alone(llm.model, *pair) for pair in PAIRS]
    assert [s[0] for s in scores] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert [s[1] for s in scores] == [e[1] for e in expected]
    assert len({round(s[0], 6) for s in scores}) == len(PAIRS) - 1  # all differ but the duplicate


def test_only_what_greedy_decoding_would_write_is_greedy(llm, mask):
    contexts = [(7,), (1, 2, 3), (250, 4)]
    with llm.pruned(mask):
        pairs = [(context, greedy_continuation(llm.model, context, 3)) for context in contexts]
        for position in range(3):  # the same with one token changed
            for context, best in pairs[:3]:
                pairs.append((context, (*best[:position], (best[position] + 1) % 256, *best[position + 1 :])))
        greedy = [is_greedy for _, is_greedy in score_continuations(llm, pairs)]
    assert greedy == [True] * 3 + [False] * 9


def test_scores_do_not_depend_on_how_requests_are_batched(llm):
    expected = score_continuations(llm, PAIRS)
    for batch_tokens in (1, 50, 333):
        scores = score_continuations(llm, PAIRS, batch_tokens)
        assert [s[0] for s in scores] == pytest.approx([e[0] for e in expected], abs=1e-5)
        assert [s[1] for s in scores] == [e[1] for e in expected]


def test_scores_do_not_depend_on_the_order_of_requests(llm):
    expected = score_continuations(llm, PAIRS)
    scores = score_continuations(llm, PAIRS[::-1])[::-1]
    assert [s[0] for s in scores] == pytest.approx([e[0] for e in expected], abs=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_scores_do_not_depend_on_how_the_head_is_cut(llm, monkeypatch, rows):
    expected = score_continuations(llm, PAIRS)
    monkeypatch.setattr(scoring, "_HEAD_ROWS", rows)
    assert [s[0] for s in score_continuations(llm, PAIRS)] == pytest.approx([e[0] for e in expected], abs=1e-5)


def test_choices_of_one_token_share_their_context():
    pairs = [((1, 2), (3,)), ((1, 2), (4,)), ((1, 2), (3, 4)), ((1, 2, 3), (9,)), ((5,), (6, 7))]
    assert forwarded_inputs(pairs) == {(1, 2): [0, 1], (1, 2, 3): [2, 3], (5, 6): [4]}


def test_each_distinct_input_is_forwarded_once_within_the_token_limit(llm, monkeypatch):
    batches = []
    open_stream = llm.open_stream

    def record(input_ids, **inputs):
        batches.append(tuple(input_ids.shape))
        return open_stream(input_ids, **inputs)

    monkeypatch.setattr(llm, "open_stream", record)
    # Distinct inputs of 6, 4, 3, 3 and 1 tokens; with 9 tokens at once: 6 | 2 x 4 padded | 3 + 1 padded.
    pairs = [
        (tuple(range(10, 16)), (1,)),
        (tuple(range(20, 24)), (1,)),
        ((30, 31, 32), (1,)),
        ((30, 31, 32), (2,)),
        ((40, 41), (42, 43)),
        ((50,), (51,)),
    ]
    score_continuations(llm, pairs, batch_tokens=9)
    assert batches == [(1, 6), (2, 4), (2, 3)]


def test_an_input_longer_than_the_limit_is_forwarded_alone(llm):
    pairs = [(tuple(range(30)), (1,)), ((1, 2), (3,))]
    expected = [score_alone(llm.model, *pair)[0] for pair in pairs]
    assert [s[0] for s in score_continuations(llm, pairs, batch_tokens=10)] == pytest.approx(expected, abs=1e-4)


def test_bfloat16_logits_are_normalised_in_float32():
    llm = build_tiny_llm(dtype="bfloat16")
    scores = [score for score, _ in score_continuations(llm, [(SHARED, (token,)) for token in range(257)])]
    assert torch.tensor(scores).double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    with torch.inference_mode():
        logits = llm.model(torch.tensor([SHARED])).logits[0, -1]
    assert scores == pytest.approx(logits.double().log_softmax(-1).tolist(), abs=1e-5)


def test_no_requests_give_no_scores(llm):
    assert score_continuations(llm, []) == []


def test_scoring_leaves_no_gradient_and_no_mask_behind(llm):
    score_continuations(llm, PAIRS[:2])
    assert llm.mask == PruningMask.all_kept(llm.shape)
    assert all(p.grad is None for p in llm.model.parameters())
