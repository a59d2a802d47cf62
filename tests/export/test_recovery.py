"""Recovery learns, is merged into what is exported, and is refused where it did not help."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rap_env.errors import ExportRefused
from rap_env.export.pruned import PrunedModel
from rap_env.export.recovery import Recovery, recovered
from rap_env.export.save import export_pruned
from rap_env.mask import PruningMask
from tests.export.cases import MEMBERS, PAIRS, cut_llm, llm_with_merges

TEXT = "The quick brown fox jumps over the lazy dog. " * 40
LEARNING = Recovery(TEXT, steps=12, window_tokens=32, learning_rate=5e-3)


@pytest.fixture
def llm():
    pytest.importorskip("peft", reason="peft is not installed: pip install -e '.[export]'")
    return cut_llm(*MEMBERS["llama, 2 KV heads"])


@pytest.fixture
def mask(llm) -> PruningMask:
    return PruningMask.all_kept(llm.shape).drop("layer0.attention", "layer1.mlp.0:16")


def test_the_loss_on_held_out_text_falls_and_the_export_has_the_merged_weights(llm, mask, tmp_path):
    exported = export_pruned(llm, mask, "hf", tmp_path / "out", LEARNING)
    before, after = exported.losses
    model = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float32, trust_remote_code=True)
    assert not any("lora" in name for name in model.state_dict())
    size = LEARNING.window_tokens
    tokens = torch.tensor(llm.tokenizer(TEXT).input_ids)
    windows = tokens[: len(tokens) // size * size].view(-1, size)
    held_out = windows[-(len(windows) // 10) :]
    with torch.inference_mode():
        with llm.pruned(mask):
            assert llm.model(held_out, labels=held_out).loss.item() == pytest.approx(before, abs=1e-4)
        assert model(held_out, labels=held_out).loss.item() == pytest.approx(after, abs=1e-4)
    assert after < before - 0.1


@pytest.mark.parametrize("format", ["deci", "gguf"])
def test_recovered_weights_go_into_every_format(format, llm, tmp_path):
    llm = llm_with_merges("llama", PAIRS)
    mask = PruningMask.all_kept(llm.shape).drop("layer1.mlp")
    exported = export_pruned(llm, mask, format, tmp_path / "out", LEARNING)
    assert exported.losses[1] < exported.losses[0]


def test_the_same_seed_learns_the_same_and_the_model_stays_as_it_was(llm, mask):
    pruned, weights = PrunedModel.of(llm, mask), {n: p.clone() for n, p in llm.model.named_parameters()}
    first, second = (recovered(pruned, LEARNING) for _ in range(2))
    assert torch.equal(first.model.logits, second.model.logits) and first.loss_after == second.loss_after
    assert not torch.equal(first.model.logits, pruned.logits)
    assert all(torch.equal(weights[name], parameter) for name, parameter in llm.model.named_parameters())


def test_recovery_that_makes_the_model_worse_is_refused(llm, mask):
    able = recovered(PrunedModel.of(llm, mask), replace(LEARNING, steps=60)).model  # a random model has much to gain
    narrow = replace(LEARNING, text="a" * 1800 + TEXT[:200])  # of which the last windows are held out
    with pytest.raises(ExportRefused, match=r"recovery made the model no better: loss on held-out text \d"):
        recovered(able, narrow)


def test_a_model_that_only_learned_the_most_frequent_token_is_refused_and_nothing_is_written(llm, mask, tmp_path):
    coarse = replace(LEARNING, learning_rate=3.0)  # its loss is lower than a random model's
    with pytest.raises(
        ExportRefused, match=r"repeats itself: \d% of 32 generated tokens differ, expected at least 10%"
    ):
        export_pruned(llm, mask, "hf", tmp_path / "out", coarse)
    assert not list(tmp_path.iterdir())


def test_text_and_steps_that_are_too_few_are_refused(llm, mask):
    pruned = PrunedModel.of(llm, mask)
    with pytest.raises(ExportRefused, match="expected text of at least 256 tokens for recovery; got 5"):
        recovered(pruned, Recovery("short", steps=5))
    with pytest.raises(ExportRefused, match="expected at least 1 step of recovery; got 0"):
        recovered(pruned, Recovery(TEXT, steps=0))


def test_without_peft_the_error_says_what_to_install(llm, mask, monkeypatch):
    pruned = PrunedModel.of(llm, mask)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportRefused, match=r"needs the package peft: pip install 'rap-env\[export\]'"):
        recovered(pruned, LEARNING)
