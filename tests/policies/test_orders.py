"""Every workload is served by the order of the nearest one."""

import pytest

from rap_env.errors import InvalidMask
from rap_env.llm.loading import load_llm
from rap_env.memory.footprint import dense_bytes
from rap_env.memory.workload import Workload
from rap_env.policies import NearestOrderPolicy, OrderPolicy, even_order
from tests.policies.cases import ORDER


@pytest.mark.parametrize(
    ("workload", "first"),
    [
        (Workload(1, 1), ORDER[0]),
        (Workload(1, 64), ORDER[0]),
        (Workload(4, 20), ORDER[0]),  # 80 tokens: 1.25 times 64, and 100 is 1.25 times 80: the smaller serves
        (Workload(1, 81), ORDER[1]),
        (Workload(10, 10), ORDER[1]),
        (Workload(2, 495), ORDER[1]),  # 990 tokens are 9.9 times 100, and 9,801 is 9.9 times 990
        (Workload(1, 900, 91), ORDER[2]),  # 991 tokens: the generated ones count too
        (Workload(16, 2048), ORDER[2]),
    ],
)
def test_the_order_of_the_nearest_cached_tokens_serves(tiny_llm, workload, first):
    shape = tiny_llm.shape
    orders = {
        tokens: [ORDER[start], *ORDER[:start], *ORDER[start + 1 :]] for start, tokens in enumerate((64, 100, 9801))
    }
    policy = NearestOrderPolicy(shape, dict(reversed(orders.items())))
    (dropped,) = policy.decide(workload, dense_bytes(shape, workload) - 1).dropped
    assert dropped.name == first


def test_no_order_and_orders_that_miss_components_are_refused(tiny_llm):
    with pytest.raises(ValueError, match=r"expected orders for one or more numbers of tokens, at least 1; got \[\]"):
        NearestOrderPolicy(tiny_llm.shape, {})
    with pytest.raises(ValueError, match=r"at least 1; got \[0\]"):
        NearestOrderPolicy(tiny_llm.shape, {0: ORDER})
    with pytest.raises(InvalidMask, match="expected an order over each of the 8 components once"):
        NearestOrderPolicy(tiny_llm.shape, {64: ORDER, 128: ORDER[1:]})


def test_the_even_order_takes_last_parts_first_evenly_and_heads_after_all_channels():
    llm = load_llm("tiny", granularity="group", device="cpu")
    names = even_order(llm.shape)
    heads = [f"layer{layer}.attention.{head}" for head in (1, 0) for layer in (3, 2, 1, 0)]
    assert names[-8:] == heads and all(".mlp" in name for name in names[:-8])
    mask = OrderPolicy(llm.shape, names).decide(Workload(1, 1), llm.shape.weight_bytes - 1)
    assert [component.name for component in mask.dropped] == [names[0]] and names[0].startswith("layer3.mlp")
