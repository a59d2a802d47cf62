"""What a profile counts of decoding, whose kernels torch's profiler does not know."""

from torch.profiler import ProfilerActivity, profile

from experiments.benchmarks.profile import _decoding, _kernels_seen, _shares
from rap_env.llm import few_rows
from rap_env.llm.loading import build_random_llm
from tests.llm.few_rows_kernels import NATIVE
from tests.llm.test_parts import SIZES


@NATIVE
def test_products_of_few_rows_are_told_from_the_head_with_their_operations_and_bytes():
    llm, kernels = build_random_llm("llama", SIZES, dtype="bfloat16"), few_rows._few_rows
    decode = _decoding(llm, [3, 4, 5], n_tokens=2)
    with _kernels_seen(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        decode()
    assert few_rows._few_rows is kernels
    assert {"few_rows::norm", "few_rows::rotate"} <= {event.name for event in recorded.events()}
    shares = _shares(llm, recorded.events(), plain_seconds=0.0)
    assert {"matrix products", "head", "attention", "element-wise and the rest"} <= set(shares["profiled_seconds"])
    of_sites = sum(one.numel() for site in llm.shape.sites for one in llm.parameters_of(site))
    for kind, weights in {"matrix products": of_sites, "head": 32 * 257}.items():
        assert shares["operations"][kind] == 2 * weights * 2  # multiply and add, for two tokens
        assert shares["weight_bytes"][kind] == 2 * weights * 2  # bytes of each, for two tokens
