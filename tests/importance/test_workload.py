"""Importance for each byte that a removal frees: what is expensive to keep depends on the workload."""

import dataclasses

import pytest

from rap_env.importance.gsi import bytes_by_name, greedy_sequential_importance
from rap_env.llm.loading import build_tiny_llm
from rap_env.memory.workload import Workload
from tests.importance.cases import SKETCH, WINDOWS, brute_force, loss_of, measure_by_rule, per_freed

SHORT, LONG = Workload(batch_size=1, prompt_tokens=8, generated_tokens=8), Workload(4, 250, 6)
KINDS = ("attention", "mlp")
# Parameters of 4 bytes; float32 keys and values for each of 16 and 1,024 tokens. Hidden size 32, MLP size 64, 4 heads
# of 8; Llama with 2 KV heads and 3 MLP matrices, OPT with 4, 2 and biases.
FREED = {
    ("llama", SHORT): (4 * (2 * 32 * 32 + 2 * 32 * 16) + 16 * 2 * 16 * 4, 4 * 3 * 32 * 64),
    ("llama", LONG): (4 * (2 * 32 * 32 + 2 * 32 * 16) + 1024 * 2 * 16 * 4, 4 * 3 * 32 * 64),
    ("opt", SHORT): (4 * 4 * (32 * 32 + 32) + 16 * 2 * 32 * 4, 4 * (2 * 32 * 64 + 64 + 32)),
    ("opt", LONG): (4 * 4 * (32 * 32 + 32) + 1024 * 2 * 32 * 4, 4 * (2 * 32 * 64 + 64 + 32)),
}
WORKLOADS = pytest.mark.parametrize("workload", [SHORT, LONG], ids=["short", "long"])


@pytest.fixture(scope="module")
def llama():
    """A random Llama of 4 layers, 8 components; leave it dense."""
    return build_tiny_llm("llama")


def freed_by_hand(llm, workload: Workload) -> dict[str, int]:
    by_kind = dict(zip(KINDS, FREED[llm.shape.model_type, workload], strict=True))
    return {component.name: by_kind[component.site.kind] for component in llm.shape.components}


@WORKLOADS
def test_freed_bytes_are_weights_and_for_attentions_the_kv_cache(llm, workload):
    assert bytes_by_name(llm.shape, workload) == freed_by_hand(llm, workload)


@WORKLOADS
def test_the_order_by_loss_per_byte_equals_a_brute_force_search(llm, ranking, workload):
    order, losses, _rounds = brute_force(llm, 8, freed_by_hand(llm, workload))
    by_bytes = greedy_sequential_importance(llm, WINDOWS, exact=True, workload=workload)
    assert list(by_bytes.order) == order
    assert by_bytes.losses == pytest.approx(losses, abs=1e-5)
    assert by_bytes.increases == ranking.increases, "loss, not loss per byte"
    assert by_bytes.evaluations == 36 and by_bytes.tokens == 37 * 80


def test_a_long_workload_drops_attentions_earlier_than_the_order_by_loss(llama):
    def attention_positions(**options) -> list[int]:
        order = greedy_sequential_importance(llama, WINDOWS, exact=True, **options).order
        return [position for position, name in enumerate(order) if name.endswith("attention")]

    assert sum(attention_positions(workload=LONG)) < sum(attention_positions())


@WORKLOADS
def test_after_some_removals_the_rest_is_ranked_by_loss_per_byte(llm, workload):
    freed = freed_by_hand(llm, workload)
    order, losses, rounds = brute_force(llm, 2, freed)
    partial = greedy_sequential_importance(llm, WINDOWS, removals=2, exact=True, workload=workload)
    last = {name: per_freed(loss - losses[0], freed[name]) for name, loss in rounds[-1].items() if name not in order}
    assert partial.order == (*order, *sorted(last, key=last.get))


@WORKLOADS
def test_the_lazy_rule_minimises_loss_per_byte_too(llm, monkeypatch, workload):
    freed = freed_by_hand(llm, workload)
    weights = {component.name: 1.0 + 5 * position % 8 for position, component in enumerate(llm.shape.components)}
    measure_by_rule(monkeypatch, lambda _tokens, dropped: sum(weights[name] for name in dropped) * len(dropped))
    lazy = greedy_sequential_importance(llm, WINDOWS, workload=workload)
    assert lazy == dataclasses.replace(
        greedy_sequential_importance(llm, WINDOWS, exact=True, workload=workload),
        evaluations=lazy.evaluations,
        tokens=lazy.tokens,
    )
    assert lazy.order[0] == min(weights, key=lambda name: weights[name] / freed[name])
    assert lazy.evaluations < 36


@WORKLOADS
def test_lazy_losses_by_bytes_are_those_of_the_shrunk_model(llm, workload):
    lazy = greedy_sequential_importance(llm, WINDOWS, workload=workload)
    assert lazy.losses == pytest.approx([loss_of(llm, lazy.order[: k + 1]) for k in range(8)], abs=1e-5)


def test_an_exact_ranking_by_loss_reuses_the_first_round_of_one_by_bytes(llm, ranking, store, measured):
    greedy_sequential_importance(llm, WINDOWS, removals=1, exact=True, store=store, workload=LONG)
    assert len(measured) == 1 + 8
    measured.clear()
    by_loss = greedy_sequential_importance(llm, WINDOWS, removals=1, exact=True, store=store)
    assert measured == []
    assert by_loss.order[0] == ranking.order[0] and by_loss.increases == ranking.increases


def test_a_lazy_ranking_by_loss_reuses_the_sketch_of_one_by_bytes(llm, store, measured):
    greedy_sequential_importance(llm, WINDOWS, removals=1, store=store, workload=LONG)
    known = set(measured)
    measured.clear()
    by_loss = greedy_sequential_importance(llm, WINDOWS, removals=1, store=store)
    assert not known & set(measured)
    assert any(measurement.tokens == SKETCH.numel() for measurement in known), "there was something to reuse"
    assert by_loss == greedy_sequential_importance(llm, WINDOWS, removals=1)
