"""GGUF files: what llama.cpp computes with them is what the masked model does."""

import gguf
import pytest
import torch

from rap_env.errors import ExportRefused
from rap_env.export import gguf_file, llama_cpp
from rap_env.export.pruned import PrunedModel
from rap_env.export.save import export_pruned
from rap_env.export.vocabulary import vocabulary_of
from rap_env.mask import PruningMask
from tests.export.cases import HELD, MEMBERS, PAIRS, ROPE, llm_with_merges, merging, random_masks


def all_but(llm, *names: str) -> PruningMask:
    return PruningMask.all_kept(llm.shape).drop(*names)


def values_of(folder) -> dict:
    """Entries and tensors of the file."""
    reader = gguf.GGUFReader(folder / gguf_file.FILE_NAME)
    entries = {name: field.contents() for name, field in reader.fields.items()}
    return entries | {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize("member", HELD)
def test_llama_cpp_computes_the_masked_probabilities(member, tmp_path, llama_cpp_reads):
    llm = llm_with_merges(*HELD[member])
    masks = [*random_masks(llm, 5), all_but(llm, "layer0.attention"), all_but(llm, "layer2.mlp", "layer1.mlp")]
    masks += [all_but(llm, "layer1.attention", "layer2.attention", "layer2.mlp")]
    prompt = torch.tensor([[5, 77, 130, 9, 200, 31]])
    for index, mask in enumerate(masks):
        exported = export_pruned(llm, mask, "gguf", tmp_path / str(index))
        assert exported.reader == "llama.cpp"
        reader = llama_cpp.Reader(exported.folder / gguf_file.FILE_NAME, vocabulary_of(llm.tokenizer, 258), 258)
        known = reader.next_token(prompt[0].tolist())
        with torch.inference_mode(), llm.pruned(mask):
            expected = llm.model(prompt).logits[0, -1].log_softmax(-1)
        assert len(known) == 258
        assert torch.allclose(torch.tensor([known[token] for token in range(258)]), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_keep_their_type_and_value(dtype, tmp_path):
    llm = llm_with_merges(*HELD["llama, biases"], dtype)
    folder = export_pruned(llm, all_but(llm, "layer1.mlp.0:16"), "gguf", tmp_path / "out").folder
    reader = gguf.GGUFReader(folder / gguf_file.FILE_NAME)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.1.ffn_down.weight"] == {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert types["blk.1.ffn_down.bias"] == types["output_norm.weight"] == "F32"
    written = torch.from_numpy(values_of(folder)["blk.1.ffn_down.weight"].copy())
    assert torch.equal(written, llm.model.model.layers[1].mlp.down_proj.weight[:, 16:].float())


def test_layers_that_differ_are_arrays_of_deci_with_zeros_where_llama_cpp_needs_something(tmp_path):
    llm = llm_with_merges("llama", PAIRS)
    mask = all_but(llm, "layer0.attention", "layer1.mlp", "layer1.attention.0", "layer2.mlp.0:16")
    values = values_of(export_pruned(llm, mask, "gguf", tmp_path / "out").folder)
    assert values["general.architecture"] == "deci"
    assert values["deci.attention.head_count"] == [1, 6, 8]
    assert values["deci.attention.head_count_kv"] == [1, 3, 4]
    assert values["deci.feed_forward_length"] == [64, 32, 48]
    assert not values["blk.0.attn_output.weight"].any() and not values["blk.1.ffn_down.weight"].any()
    assert values["blk.2.ffn_down.weight"].any()


def test_a_later_layer_without_attention_has_no_heads(tmp_path):
    llm = llm_with_merges("llama", PAIRS)
    values = values_of(export_pruned(llm, all_but(llm, "layer1.attention"), "gguf", tmp_path / "out").folder)
    assert values["deci.attention.head_count"] == [8, 0, 8] and values["deci.attention.head_count_kv"] == [4, 0, 4]
    assert "blk.1.attn_norm.weight" not in values and "blk.1.ffn_norm.weight" in values


def test_layers_that_are_alike_are_llamas(tmp_path):
    llm = llm_with_merges("llama", PAIRS)
    mask = all_but(llm, "layer1.attention", "layer1.mlp", "layer0.mlp.16:40", "layer2.mlp.16:40")
    values = values_of(export_pruned(llm, mask, "gguf", tmp_path / "out").folder)
    assert values["general.architecture"] == "llama" and values["llama.block_count"] == 2
    assert (values["llama.attention.head_count"], values["llama.feed_forward_length"]) == (8, 40)


def test_without_llama_cpp_tensors_are_compared_and_the_answer_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    llm = llm_with_merges("llama", PAIRS)
    assert export_pruned(llm, llm.mask, "gguf", tmp_path / "out").reader == (
        "the gguf package, tensor by tensor; xllamacpp, which runs llama.cpp, is not installed"
    )


REFUSED = {
    "opt": (MEMBERS["opt"], "OPT has learned positions"),
    "qwen3": (MEMBERS["qwen3"], "Qwen3 normalises queries and keys"),
    "window": (MEMBERS["mistral, window"], "sliding window"),
    "activation": (("llama", PAIRS | {"hidden_act": "gelu"}), "'gelu' instead of 'silu'"),
    "positions": (("llama", PAIRS | {"rope_parameters": ROPE | {"rope_type": "yarn"}}), "of rope_type 'yarn'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_can_not_compute_is_refused_and_nothing_is_written(case, tmp_path):
    member, message = REFUSED[case]
    llm = llm_with_merges(*member)
    with pytest.raises(ExportRefused, match=f"llama.cpp's architecture 'deci' can't hold this model: .*{message}"):
        export_pruned(llm, llm.mask, "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_heads_in_the_wrong_order_are_found_by_llama_cpp(tmp_path, monkeypatch, llama_cpp_reads):
    monkeypatch.setattr(gguf_file, "_interleaved", lambda tensor, heads: tensor)
    llm = llm_with_merges("llama", PAIRS)
    with pytest.raises(ExportRefused, match=r"read by llama\.cpp, does not compute what the masked model does"):
        export_pruned(llm, llm.mask, "gguf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_text_that_llama_cpp_splits_otherwise_is_found(tmp_path, monkeypatch, llama_cpp_reads):
    llm = llm_with_merges("llama", PAIRS)
    # What llama.cpp is not told: "12" is one token, and "th" is none.
    letters = {token: row for token, row in llm.tokenizer.get_vocab().items() if row < 257}
    other = merging(llm.tokenizer, model={"vocab": letters | {"12": 257}, "merges": [["1", "2"]]})
    monkeypatch.setattr(gguf_file, "vocabulary_of", lambda tokenizer, size: vocabulary_of(llm.tokenizer, size))
    pruned = PrunedModel.of(llm, llm.mask)
    gguf_file.write(pruned, tmp_path)
    object.__setattr__(pruned, "tokenizer", other)
    with pytest.raises(ExportRefused, match=r"llama\.cpp splits text into other tokens"):
        gguf_file.check(pruned, tmp_path)


def test_damaged_files_are_found(tmp_path, llama_cpp_reads):
    llm = llm_with_merges("llama", PAIRS)
    pruned = PrunedModel.of(llm, llm.mask)
    gguf_file.write(pruned, tmp_path)
    path = tmp_path / gguf_file.FILE_NAME
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    with pytest.raises(ExportRefused, match=r"does not hold '.*' as it was to be written"):
        gguf_file.check(pruned, tmp_path)
    path.write_bytes(b"GGUF no more")
    with pytest.raises(ExportRefused, match=r"llama\.cpp can't load the GGUF file"):
        llama_cpp.Reader(path, vocabulary_of(llm.tokenizer, 258), 258)


def test_prompts_that_llama_cpp_refuses_are_one_error(tmp_path, llama_cpp_reads):
    llm = llm_with_merges("llama", PAIRS)
    gguf_file.write(PrunedModel.of(llm, llm.mask), tmp_path)
    reader = llama_cpp.Reader(tmp_path / gguf_file.FILE_NAME, vocabulary_of(llm.tokenizer, 258), 258)
    with pytest.raises(ExportRefused, match=r"llama\.cpp can't run the GGUF file: .*exceed"):
        reader.next_token(range(200))
