"""An export is there whole and checked, or not at all; and which masks and folders it takes."""

import pytest
import torch

from rap_env.errors import ExportRefused, InvalidMask, UnknownName
from rap_env.export import hf, save
from rap_env.export.save import Format, export_pruned, read_mask
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.rng import global_states
from scripts.export import main
from tests.export.cases import MEMBERS, cut_llm


@pytest.fixture
def llm() -> SwitchableLLM:
    return cut_llm(*MEMBERS["llama, 2 KV heads"])


@pytest.fixture
def mask(llm) -> PruningMask:
    return PruningMask.all_kept(llm.shape).drop("layer1.mlp")


def test_nothing_stays_where_the_files_do_not_compute_the_same(llm, mask, tmp_path, monkeypatch):
    def write_wrong(pruned, folder):
        name = "model.layers.1.self_attn.k_proj.weight"
        state = pruned.state()
        wrong = pruned.with_state(state | {name: state[name] + 0.01}, pruned.logits)
        hf.write(wrong, folder)

    monkeypatch.setitem(save.FORMATS, "hf", Format(lambda pruned: None, write_wrong, hf.check))
    with pytest.raises(ExportRefused, match="read by transformers, does not compute what the masked model does"):
        export_pruned(llm, mask, "hf", tmp_path / "deep" / "out")
    assert not list((tmp_path / "deep").iterdir())


def test_nothing_stays_where_writing_fails(llm, mask, tmp_path, monkeypatch):
    def fail(pruned, folder):
        (folder / "config.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setitem(save.FORMATS, "hf", Format(lambda pruned: None, fail, hf.check))
    with pytest.raises(ExportRefused, match="no space left"):
        export_pruned(llm, mask, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_that_hold_something_are_refused_and_empty_ones_are_used(llm, mask, tmp_path):
    (tmp_path / "empty").mkdir()
    assert export_pruned(llm, mask, "hf", tmp_path / "empty").folder == tmp_path / "empty"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    before = sorted((tmp_path / "empty").iterdir())
    (tmp_path / "file").touch()
    for name in ("empty", "file"):
        with pytest.raises(ExportRefused, match=rf"expected a new or empty folder for the export; .*{name} holds"):
            export_pruned(llm, mask, "hf", tmp_path / name)
    assert sorted((tmp_path / "empty").iterdir()) == before


def test_unknown_formats_and_masks_of_nothing_or_of_another_model_are_refused(llm, mask, tmp_path):
    with pytest.raises(UnknownName, match=r"unknown export format 'onnx'; known: deci, gguf, hf"):
        export_pruned(llm, mask, "onnx", tmp_path / "out")
    with pytest.raises(ExportRefused, match="keeps at least one attention or MLP; this one drops all of them"):
        export_pruned(llm, mask.drop(*mask.components), "hf", tmp_path / "out")
    with pytest.raises(InvalidMask, match=r"expected a mask over the \d+ components of cut"):
        export_pruned(llm, PruningMask.all_kept(build_tiny_llm().shape), "hf", tmp_path / "out")


def test_an_export_leaves_the_model_and_the_random_streams_as_they_were(llm, mask, tmp_path):
    tokens = torch.arange(10)[None]
    with torch.inference_mode():
        before, states = llm.model(tokens).logits, global_states()
        export_pruned(llm, mask, "deci", tmp_path / "out")
        assert torch.equal(llm.model(tokens).logits, before) and llm.mask == PruningMask.all_kept(llm.shape)
    assert torch.equal(global_states()["torch"], states["torch"])
    assert global_states()["python"] == states["python"]


def test_a_mask_of_another_granularity_is_named(llm, mask, tmp_path):
    path = tmp_path / "mask.json"
    path.write_text(mask.to_json())
    assert read_mask(llm, path) == mask
    blocks = SwitchableLLM(llm.model, llm.tokenizer, "cut", "block")
    with pytest.raises(InvalidMask, match=r"of granularity 'group'; load the model with it: granularity=group"):
        read_mask(blocks, path)
    path.write_text(PruningMask.all_kept(blocks.shape).drop("layer0.mlp").to_json())
    with pytest.raises(InvalidMask, match=r"of granularity 'block'; load the model with it: granularity=block"):
        read_mask(llm, path)


def test_files_that_hold_no_mask_of_the_model_are_refused(llm, tmp_path):
    with pytest.raises(InvalidMask, match=r"expected a file with a pruning mask; can't read .*none\.json"):
        read_mask(llm, tmp_path / "none.json")
    (tmp_path / "mask.json").write_text("[]")
    with pytest.raises(InvalidMask, match="expected the JSON of a pruning mask"):
        read_mask(llm, tmp_path / "mask.json")
    (tmp_path / "mask.json").write_text('{"n_components": 5, "dropped": []}')
    with pytest.raises(InvalidMask, match="components; got 5"):
        read_mask(llm, tmp_path / "mask.json")


def test_the_command_exports_and_says_what_went_wrong_in_one_line(tmp_path, capsys):
    path, out = tmp_path / "mask.json", tmp_path / "out"
    path.write_text(PruningMask.all_kept(build_tiny_llm().shape).drop("layer0.attention").to_json())
    command = ["model=tiny", f"mask={path}", f"out={out}"]
    main([*command, "format=hf"])
    assert "(7 of 8 components kept); read again by transformers" in capsys.readouterr().out
    assert (out / "model.safetensors").is_file()
    with pytest.raises(SystemExit, match=r"^error: expected a new or empty folder"):
        main([*command, "format=hf"])
    with pytest.raises(SystemExit, match=r"^error: .*granularity=block"):
        main([*command, "format=hf", "granularity=group"])
    with pytest.raises(SystemExit):
        main([*command, "format=hf", "recover_steps=5"])
    assert "recover_steps and text belong together" in capsys.readouterr().err
