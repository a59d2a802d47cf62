"""A model on several devices: layers in runs, all else on the first; here devices are the CPU and torch's `meta`."""

import pytest
import torch

from rap_env.errors import UnknownName, UnsupportedArchitecture
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.llm.architecture import DecoderLayer
from rap_env.llm.loading import build_tiny_llm, load_llm
from rap_env.llm.packing import TokenTree
from rap_env.llm.placement import moved, spread

WINDOWS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def spread_tiny(devices):
    llm = build_tiny_llm()
    spread(llm.model, llm.model.model, devices)
    return llm


def test_layers_lie_in_runs_and_all_else_on_the_first_device():
    llm = spread_tiny(["cpu", "meta", "cpu", "meta"])
    devices = [{parameter.device.type for parameter in layer.parameters()} for layer in llm.model.model.layers]
    assert devices == [{"cpu"}, {"meta"}, {"cpu"}, {"meta"}]
    assert [layer.self_attn.layer_idx for layer in llm.model.model.layers] == [0, 1, 2, 3]
    rest = [value for name, value in llm.model.state_dict().items() if ".layers." not in name]
    assert {value.device.type for value in rest} == {"cpu"} and llm.device.type == "cpu"


def test_a_model_that_is_spread_computes_the_same(tiny_llm):
    evaluator = PerplexityEvaluator(WINDOWS, "text")
    assert evaluator.evaluate(spread_tiny(["cpu", "cpu"])) == evaluator.evaluate(tiny_llm)


def test_the_stream_and_its_context_follow_the_layers(monkeypatch):
    llm = spread_tiny(["cpu", "meta"])
    crossings, run = [], DecoderLayer.run

    def watched(self, kind, hidden, context):
        out = run(self, kind, hidden, context)
        crossings.append((hidden.device.type, out.device.type))
        return out

    monkeypatch.setattr(DecoderLayer, "run", watched)
    hidden, context = llm.open_stream(WINDOWS)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # on its way back to the first
        llm.run(llm.shape.sites, hidden, context)
    assert crossings == [("cpu", "cpu")] * 4 + [("meta", "meta")] * 4


def test_what_holds_tensors_is_moved_and_the_rest_stays():
    tensor, other = torch.zeros(2), object()
    found = moved({"mask": None, "pair": (tensor, tensor), "other": other}, torch.device("meta"))
    assert [item.device.type for item in found["pair"]] == ["meta", "meta"]
    assert found["mask"] is None and found["other"] is other
    assert moved(tensor, torch.device("cpu")) is tensor


def test_packed_streams_of_a_spread_model_are_refused():
    with pytest.raises(UnsupportedArchitecture, match="on several devices, where only windows of text can be read"):
        spread_tiny(["cpu", "meta"]).open_packed([TokenTree((1, 2, 3))])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_spreading_over_no_card_is_refused():
    with pytest.raises(UnknownName, match="unknown device 'spread'"):
        load_llm("tiny", device="spread")
