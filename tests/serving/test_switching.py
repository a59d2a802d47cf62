"""From one mask to another in steps, so that copies of few sites are in memory twice."""

import pytest

from rap_env.llm.formats import quantise
from rap_env.llm.live import LiveModel
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.policies import DensePolicy
from rap_env.serving import Controller
from rap_env.serving.switching import Switching
from tests.llm.weights_cases import LARGE, half, less


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RAP_CACHE", str(tmp_path))


@pytest.mark.parametrize(("weights", "steps"), [("full", 1), ("int8", 3)])
def test_sites_with_copies_change_a_few_at_a_time(weights, steps, monkeypatch):
    whole = build_random_llm("llama", LARGE, dtype="bfloat16")
    llm = SwitchableLLM(quantise(whole.model, weights), whole.tokenizer, "large", "group")
    assert len(llm.shape.sites) == 32
    WeightStore(llm)
    model, masks = LiveModel(llm), []
    switch = model.switch
    monkeypatch.setattr(model, "switch", lambda mask: (masks.append(mask), switch(mask)))
    controller = Controller(llm.shape, {"dense": DensePolicy(llm.shape)}, lambda: 0.0, lambda: 0.0)
    switching = Switching(model, controller, "left out")
    for wanted in (half(llm), less(llm)):
        masks.clear()
        assert switching.follow(wanted, []) and llm.mask == wanted == masks[-1] and len(masks) == steps
        before = PruningMask.all_kept(llm.shape) if wanted == half(llm) else half(llm)
        for mask in masks:
            changed = [own for _site, own in mask.components.sites if mask.keep[own] != before.keep[own]]
            assert len(changed) <= (12 if weights == "int8" else 32)
            before = mask
