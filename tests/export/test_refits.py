"""Models with ordered parts and refitted output matrices: the refits are what is written, in every format."""

import pytest
import torch
from safetensors.torch import load_file

from rap_env.components import MLP
from rap_env.errors import ExportRefused
from rap_env.export.save import export_pruned
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask, kept_sites
from rap_env.widths.compensation import COMPENSATIONS
from rap_env.widths.prepare import WidthRecipe, prepare_widths
from tests.export.cases import HELD, MEMBERS, cut_llm, llm_with_merges

WINDOWS = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(4))
OUTPUTS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RAP_CACHE", str(tmp_path / "cache"))


def prepared(llm: SwitchableLLM, compensation: str) -> SwitchableLLM:
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation=compensation))
    return llm


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("member", ["llama, 2 KV heads", "llama, biases", "qwen2"])
def test_refits_and_their_biases_are_what_is_written(member, compensation, tmp_path):
    llm = prepared(cut_llm(*MEMBERS[member]), compensation)
    narrow = [len(bits) - 1 for _site, bits in llm.mask.kept_parts]
    mask = PruningMask.from_widths(llm.shape, narrow)
    state = load_file(export_pruned(llm, mask, "hf", tmp_path / "out").folder / "model.safetensors")
    for site in kept_sites(mask):
        weight, bias = llm.refits.of(site)
        path = f"model.layers.{site.layer}.{OUTPUTS[site.kind]}"
        assert torch.equal(state[f"{path}.weight"], weight)
        assert bias is None or torch.equal(state[f"{path}.bias"], bias)
        assert (bias is not None) == (compensation == "bias")


@pytest.mark.parametrize("format", ["deci", "gguf"])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_other_formats_hold_them_too(compensation, format, tmp_path):
    llm = prepared(llm_with_merges(*HELD["llama"]), compensation)
    widths = [1 if site.kind == MLP else len(bits) for site, bits in llm.mask.kept_parts]
    exported = export_pruned(llm, PruningMask.from_widths(llm.shape, widths), format, tmp_path / "out")
    assert list(exported.folder.iterdir()), "the export was compared with the masked model"


@pytest.mark.parametrize("quantised", [{"weights": "int8"}, {"kv_cache": "int8"}])
def test_quantised_models_are_refused(quantised, tmp_path):
    llm = cut_llm(*MEMBERS["llama, 2 KV heads"])
    llm.quantise(**quantised)
    with pytest.raises(ExportRefused, match="got quantised ones: load the model with weights='full'"):
        export_pruned(llm, llm.mask, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())
