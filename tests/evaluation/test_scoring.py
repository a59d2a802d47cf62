"""Log-likelihoods equal those of one plain forward for each request, however the requests are packed."""

import itertools
import random

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from rap_env.evaluation import scoring
from rap_env.evaluation.scoring import ScoringPlan
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.packing import TokenTree
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from tests.evaluation.scoring_cases import score_continuations

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


def build_llm(family: str):
    """A tiny model; upstream reads a sliding window from the config at every forward, so it can be set afterwards."""
    llm = build_tiny_llm("mistral" if family == "sliding window" else family)
    if family == "sliding window":
        llm.model.config.sliding_window = 5
        llm = SwitchableLLM(llm.model, llm.tokenizer, "narrow")
    return llm


@pytest.fixture(scope="module", params=["llama", "opt", "qwen2", "sliding window"])
def llm(request):
    return build_llm(request.param)


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
def score_padded(model, pairs) -> list[float]:
    """All requests in one batch by upstream's forward, each with a row of its own, padded on the right."""
    sequences = [torch.tensor(context + continuation) for context, continuation in pairs]
    tokens = pad_sequence(sequences, batch_first=True)
    real = torch.arange(tokens.shape[1]) < torch.tensor([len(sequence) for sequence in sequences])[:, None]
    logprobs = model(tokens, attention_mask=real.long()).logits.double().log_softmax(-1)
    return [
        sum(logprobs[row, len(context) + offset - 1, token].item() for offset, token in enumerate(continuation))
        for row, (context, continuation) in enumerate(pairs)
    ]


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


def test_scores_equal_those_of_a_padded_batch(llm, mask):
    with llm.pruned(mask):
        expected = score_padded(llm.model, PAIRS)
        assert [s[0] for s in score_continuations(llm, PAIRS)] == pytest.approx(expected, abs=1e-4)


def test_the_sliding_window_is_felt():
    pair = (tuple(range(20)), (30, 31, 32))
    narrow, wide = (score_continuations(build_llm(name), [pair])[0][0] for name in ("sliding window", "mistral"))
    assert abs(narrow - wide) > 0.01


def test_many_masks_are_scored_to_the_bit_as_each_alone(llm):
    rng = random.Random(0)
    masks = [PruningMask.from_bits(llm.shape, [code >> bit & 1 for bit in range(8)]) for code in (0, 255, 254, 127)]
    masks += [PruningMask.from_bits(llm.shape, [rng.randint(0, 1) for _ in range(8)]) for _ in range(4)]
    with llm.pruned(masks[5]):
        together = list(ScoringPlan(PAIRS, 100).run(llm, masks))
        assert llm.mask == masks[5]
    assert sorted(mask.keep for mask, _ in together) == sorted(mask.keep for mask in masks), "each mask once"
    for mask, scores in together:
        with llm.pruned(mask):
            assert scores == score_continuations(llm, PAIRS, 100)
    assert len({tuple(scores) for _, scores in together}) == 8


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


def test_there_may_be_more_lanes_than_rows_of_logits_that_are_alive_at_once(llm, monkeypatch):
    expected = score_continuations(llm, PAIRS)
    monkeypatch.setattr(scoring, "n_lanes", lambda *_: scoring._HEAD_ROWS + 1)
    monkeypatch.setattr(scoring, "in_lanes", lambda work, parts: [work(part) for part in parts])
    assert [s[0] for s in score_continuations(llm, PAIRS)] == pytest.approx([e[0] for e in expected], abs=1e-5)


def test_bfloat16_logits_are_normalised_in_float32():
    llm = build_tiny_llm(dtype="bfloat16")
    scores = [score for score, _ in score_continuations(llm, [(SHARED, (token,)) for token in range(257)])]
    assert torch.tensor(scores).double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    with torch.inference_mode():
        hidden, context, _ = llm.open_packed([TokenTree(tuple(SHARED))])
        logits = llm.logits(llm.run(llm.shape.sites, hidden, context)[0, -1:])[0]
    assert scores == pytest.approx(logits.double().log_softmax(-1).tolist(), abs=1e-5)


def test_scoring_leaves_no_trace_also_when_it_is_abandoned(llm, mask):
    tokens = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
    masks = [PruningMask.all_kept(llm.shape), mask.drop("layer3.attention"), mask.drop("layer1.mlp")]
    before, implementation = llm.model(tokens).logits, llm.model.config._attn_implementation
    for abandoned in (False, True):
        run = ScoringPlan(PAIRS, 50).run(llm, masks)
        results = [next(run)] if abandoned else list(run)
        assert len(results) == (1 if abandoned else 3)
        assert torch.equal(llm.model(tokens).logits, before)  # while the abandoned run is still open
        run.close()
        assert torch.equal(llm.model(tokens).logits, before)
        assert llm.model.config._attn_implementation == implementation
    assert llm.mask == PruningMask.all_kept(llm.shape)
    assert all(p.grad is None for p in llm.model.parameters())


@pytest.mark.llm
def test_scores_of_the_embedded_model_equal_plain_forwards(embedded_llm_float32):
    llm = embedded_llm_float32
    contexts = ("The capital of France is", "Water boils at a temperature of 100", "A")
    choices = (" Paris", " London, of course", " degrees Celsius", " small cat sat")
    pairs = [tuple(tuple(llm.tokenizer.encode(text)) for text in pair) for pair in itertools.product(contexts, choices)]
    with llm.pruned(PruningMask.all_kept(llm.shape).drop("layer0.attention", "layer17.mlp")):
        scores = score_continuations(llm, pairs)
        expected = [score_alone(llm.model, *pair) for pair in pairs]
    assert [s[0] for s in scores] == pytest.approx([e[0] for e in expected], abs=1e-3)
    assert [s[1] for s in scores] == [e[1] for e in expected]
