"""LoRA adapters are merged when a reranker is loaded."""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from rap_env.errors import ModelUnavailable
from rap_env.rerank import Reranker
from rap_env.rng import isolated_rng
from tests.rerank.cases import DOCUMENTS, QUERY, tiny, upstream_scores


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A tiny model and an adapter that changes its scores."""
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    llm = tiny()
    llm.model.save_pretrained(model)
    llm.tokenizer.save_pretrained(model)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings(), isolated_rng(0):
        warnings.simplefilter("ignore", FutureWarning)
        peft.get_peft_model(llm.model, config).save_pretrained(adapter)
    return model, adapter


def merged_by_hand(adapter: Path):
    """The model with 2 B A added to each matrix, which is alpha over rank."""
    llm, tensors = tiny(), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in tensors if "lora_A" in name]:
        matrix = llm.model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        matrix.weight.data += 2 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    return llm


def test_an_adapter_is_added_to_the_weights(folders):
    model, adapter = folders
    reranker = Reranker.load(str(model), adapter, dtype="float32", device="cpu")
    expected = upstream_scores(merged_by_hand(adapter), QUERY, DOCUMENTS)
    scores = reranker.ranking(QUERY, DOCUMENTS).scores
    assert np.abs(np.array(scores) - expected).max() < 1e-5
    assert np.abs(np.array(scores) - upstream_scores(tiny(), QUERY, DOCUMENTS)).max() > 0.01
    assert upstream_scores(reranker.llm, QUERY, DOCUMENTS) == pytest.approx(scores, abs=1e-5)
    assert not any(parameter.requires_grad for parameter in reranker.llm.model.parameters())


def test_an_adapter_is_merged_in_float32_and_the_model_keeps_its_type(folders):
    model, adapter = folders
    reranker = Reranker.load(str(model), adapter, dtype="bfloat16", device="cpu")
    weight = reranker.llm.model.model.layers[0].mlp.down_proj.weight
    before = tiny().model.model.layers[0].mlp.down_proj.weight.detach().bfloat16().float()
    added = merged_by_hand(adapter).model.model.layers[0].mlp.down_proj.weight.detach()
    added = added - tiny().model.model.layers[0].mlp.down_proj.weight.detach()
    assert weight.dtype == torch.bfloat16
    torch.testing.assert_close(weight.float(), (before + added).bfloat16().float(), rtol=0.01, atol=1e-6)
    assert reranker.llm.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_folder_without_an_adapter_is_told(folders, tmp_path):
    model, adapter = folders
    with pytest.raises(ModelUnavailable, match=r"it has no adapter_config\.json and no adapter_model\.safetensors"):
        Reranker.load(str(model), tmp_path / "nothing")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelUnavailable, match=r"it has no adapter_model\.safetensors"):  # pickled ones are not read
        Reranker.load(str(model), adapter)


def test_an_adapter_of_another_model_or_a_part_of_one_is_told(folders):
    model, adapter = folders
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(ModelUnavailable, match="can't be merged"):
        Reranker.load(str(model), adapter)
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(ModelUnavailable, match="can't be merged"):
        Reranker.load(str(model), adapter)
    path.write_bytes(b"nothing")
    with pytest.raises(ModelUnavailable, match="can't be merged"):
        Reranker.load(str(model), adapter)
    config = adapter / "adapter_config.json"
    save_file(tensors, path)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"target_modules": ["conv"]}))
    with pytest.raises(ModelUnavailable, match="can't be merged"):
        Reranker.load(str(model), adapter)


def test_without_peft_one_is_told_what_to_install(folders, monkeypatch):
    model, adapter = folders
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelUnavailable, match=r"pip install 'rap-env\[export\]'"):
        Reranker.load(str(model), adapter)
