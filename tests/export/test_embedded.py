"""The embedded model, with a mask over parts of sites, through each format."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rap_env.components import MLP
from rap_env.export.save import export_pruned
from rap_env.llm import parts
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask

pytestmark = pytest.mark.llm
TEXT = "The capital of France is Paris, and the capital of Italy is"


@pytest.fixture(scope="module")
def llm(embedded_llm_float32) -> SwitchableLLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "GROUP_CHANNELS", 64)
        yield SwitchableLLM(embedded_llm_float32.model, embedded_llm_float32.tokenizer, "smollm2-135m", "group")


@pytest.fixture(scope="module")
def mask(llm) -> PruningMask:
    """Drops 1 in 16 parts and some whole sites, among them the first attention and the last layer."""
    draws = torch.rand(len(llm.shape.components), generator=torch.Generator().manual_seed(3)).tolist()
    dropped = [row for row, draw in zip(llm.shape.components, draws, strict=True) if draw < 1 / 16]
    sites = ["layer0.attention", "layer4.mlp", "layer17.attention", "layer29.attention", "layer29.mlp"]
    return PruningMask.all_kept(llm.shape).drop(*dropped, *sites)


def test_transformers_computes_exactly_the_masked_logits_and_generates_the_same(llm, mask, tmp_path):
    exported = export_pruned(llm, mask, "hf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(exported.folder, trust_remote_code=True).eval()
    assert model.config.num_hidden_layers == 29 and model.dtype == torch.float32
    tokens = llm.tokenizer(TEXT, return_tensors="pt")
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    with torch.inference_mode():
        ours = model.generate(**tokens, **options)
        with llm.pruned(mask):
            assert torch.equal(ours, llm.model.generate(**tokens, **options))
            assert torch.equal(model(ours).logits, llm.model(ours).logits)


@pytest.mark.slow
def test_llama_cpp_computes_what_the_masked_model_does(llm, mask, tmp_path, llama_cpp_reads):
    assert export_pruned(llm, mask, "gguf", tmp_path / "out").reader == "llama.cpp"


@pytest.mark.slow
def test_readers_of_decilm_compute_what_the_masked_model_does(llm, tmp_path):
    channels = [row for row in llm.shape.components if row.site.kind == MLP and row.part in (0, 5, 7)]
    mask = PruningMask.all_kept(llm.shape).drop(*channels, "layer3.attention", "layer7.mlp")
    assert export_pruned(llm, mask, "deci", tmp_path / "out").reader.startswith("the rules of DeciLM's readers")
