"""What the benchmark's parts share: calls in turn, ratios, and counted operations."""

from experiments.benchmarks.timing import alternate, forward_flops, speedup
from rap_env.mask import PruningMask


def test_ways_are_called_in_turn_and_in_turned_order():
    calls = []
    ways = {name: lambda repeat, name=name: calls.append((name, repeat)) or name for name in "ab"}
    seconds, results = alternate(ways, 2)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert results == {"a": ["a", "a"], "b": ["b", "b"]}
    assert [len(seconds[name]) for name in "ab"] == [2, 2]


def test_a_speedup_is_the_median_of_the_repeats_ratios():
    compared = speedup([4.0, 9.0, 10.0], [2.0, 3.0, 10.0])
    assert compared["ratios"] == [2.0, 3.0, 1.0] and compared["ratio"] == 2.0
    assert (compared["plain_median_seconds"], compared["our_median_seconds"]) == (9.0, 3.0)


def test_floating_point_operations_count_kept_weights_and_read_logits(tiny_llm):
    mask = PruningMask.all_kept(tiny_llm.shape).drop("layer0.mlp")
    attention = 32 * 32 * 2 + 2 * 32 * 16  # query and output, key and value
    mlp = 3 * 32 * 64
    assert forward_flops(tiny_llm, mask, 10, 3) == 2 * 10 * (4 * attention + 3 * mlp) + 2 * 3 * 32 * 257
