"""A finished run's model and masks leave the project as the run had them, or one line says what is in the way."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import uvicorn
from fastapi.testclient import TestClient
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, dynamic_module_utils

from experiments.recipes.build import build
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask, kept_sites
from scripts.endpoint import main as serve
from scripts.export import main

CONF = Path(__file__).parents[2] / "conf"
TOKENS = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
GROUPS = ("agent=uniform", "model.granularity=group", "widths.n_samples=4", "widths.tokens_per_sample=48")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture(scope="module")
def groups(run_here, folder) -> dict:
    return run_here(folder / "groups", *GROUPS)


@pytest.fixture(autouse=True)
def own_caches(folder, monkeypatch):
    monkeypatch.setenv("RAP_CACHE", str(folder / "cache"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setattr("sys.path", list(sys.path))


@pytest.fixture
def refused(tmp_path):
    """What the command says of a run that it refuses; nothing may stay behind."""

    def run(*options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*options, "format=hf", f"out={tmp_path / 'out'}"])
        assert not (tmp_path / "out").exists()
        return str(stopped.value)

    return run


def model_of(*overrides: str) -> SwitchableLLM:
    """The model of a smoke run, as the run itself builds it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build(compose("config", ["experiment=smoke", *overrides]), "embedded").search.llm


def changed(folder: Path, to: Path, **entries: dict) -> Path:
    """A copy of a run's folder whose record has other entries."""
    record = json.loads((folder / "record.json").read_text())
    to.mkdir()
    (to / "record.json").write_text(json.dumps({key: entries.get(key, value) for key, value in record.items()}))
    return to


@pytest.mark.parametrize("compensation", ["none", "bias", "ridge"])
def test_an_exported_mask_of_a_run_computes_what_the_run_evaluated(compensation, run_here, folder, tmp_path, capsys):
    overrides = (*GROUPS, f"widths.compensation={compensation}")
    row = run_here(folder / compensation, *overrides)["results"]["rows"][1]
    main([f"run={folder / compensation}", "scenario=2", "format=hf", f"out={tmp_path / 'out'}"])
    assert "read again by transformers" in capsys.readouterr().out
    llm = model_of(*overrides)
    mask = PruningMask.all_kept(llm.shape).drop(*row["dropped"])
    assert any(site.parts for site in kept_sites(mask)) and bool(llm.refits) == (compensation != "none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True).eval()
    with torch.inference_mode(), llm.pruned(mask):
        assert torch.equal(model(TOKENS).logits, llm.model(TOKENS).logits)


def test_masks_over_whole_sites_need_no_text(run_here, folder, tmp_path):
    run_here(folder / "blocks", "agent=random", "calibration=local", f"calibration.corpus.paths=[{text(folder)}]")
    text(folder).unlink()
    main([f"run={folder / 'blocks'}", "scenario=1", "format=hf", f"out={tmp_path / 'out'}"])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def text(folder: Path) -> Path:
    path = folder / "words.txt"
    if not path.exists():
        path.write_text(" ".join(f"word{index}" for index in range(4000)))
    return path


def test_another_mask_of_the_run_is_a_file(groups, folder, tmp_path):
    names = groups["results"]["components"]
    path = tmp_path / "mask.json"
    path.write_text(json.dumps({"n_components": len(names), "dropped": [names[1]]}))
    main([f"run={folder / 'groups'}", f"mask={path}", "format=hf", f"out={tmp_path / 'out'}"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_kv_heads"] == [1, 2, 2, 2]


def test_masks_in_another_order_of_parts_are_refused_with_what_would_help(groups, folder, refused, tmp_path):
    path, names = tmp_path / "mask.json", groups["results"]["components"]
    path.write_text(json.dumps({"n_components": len(names), "dropped": [names[1]]}))
    of_model = refused("model=tiny", "granularity=group", "dtype=float32", f"mask={path}")
    assert of_model == f"error: {path} holds a mask over parts that a run has ordered; name the run: run=FOLDER"
    path.write_text(json.dumps({"n_components": len(names), "dropped": [names[1].partition("@")[0]]}))
    assert "parts in the order of the checkpoint; those of random-llama were" in refused(
        f"run={folder / 'groups'}", f"mask={path}"
    )


@pytest.mark.parametrize("scenario", [[], ["scenario=0"], ["scenario=3"]])
def test_scenarios_are_listed_where_none_is_chosen(scenario, groups, folder, refused):
    first, *listed = refused(f"run={folder / 'groups'}", *scenario).splitlines()
    got = scenario[0].partition("=")[2] if scenario else "none"
    assert first.startswith(f"error: expected scenario=1 to 2, or mask=FILE; got {got}. {folder / 'groups'}")
    row, dense = groups["results"]["rows"][1], groups["results"]["dense"]["embedded"]
    score = row["reports"]["embedded"]["score"]
    assert len(listed) == 2 and listed[1] == (
        f"  scenario=2: 16 x 1024+0 tokens in {row['budget_bytes']:,} bytes (80% of dense),"
        f" {len(row['dropped'])} dropped; score {score:.4f} on embedded ({dense - score:.4f} below dense)"
    )


def test_folders_without_a_runs_record_are_refused(refused, tmp_path):
    assert f"expected the folder of a finished run; can't read {tmp_path / 'record.json'}" in refused(f"run={tmp_path}")
    (tmp_path / "record.json").write_text('{"config": {}}')
    assert "a record needs config, provenance, results" in refused(f"run={tmp_path}")
    (tmp_path / "record.json").write_text('{"config": {}, "provenance": {}, "results": {}}')
    assert "expected a run's record with masks for its scenarios" in refused(f"run={tmp_path}")


@pytest.mark.parametrize(("name", "format"), [("weights", "int8"), ("kv_cache", "int8")])
def test_quantised_runs_are_refused_with_what_would_help(name, format, groups, folder, refused, tmp_path):
    config = groups["config"] | {"model": groups["config"]["model"] | {name: format}}
    run = changed(folder / "groups", tmp_path / "run", config=config)
    assert f"model.{name}={format}: run it again with model.{name}=full" in refused(f"run={run}", "scenario=1")


@pytest.mark.parametrize(
    ("without", "named"),
    [("widths", "widths"), ("calibration.seed", "calibration.seed"), ("model.weights", "model.weights")],
)
def test_what_a_config_lacks_is_named(without, named, groups, folder, refused, tmp_path):
    config = json.loads(json.dumps(groups["config"]))
    *path, last = without.split(".")
    del (config[path[0]] if path else config)[last]
    run = changed(folder / "groups", tmp_path / "run", config=config)
    assert re.search(
        rf"a config that the model can be built from; .* has none for {named}$", refused(f"run={run}", "scenario=1")
    )


def test_errors_of_what_a_config_names_are_said_as_they_are(groups, folder, refused, tmp_path):
    model = groups["config"]["model"]
    run = changed(folder / "groups", tmp_path / "run", config=groups["config"] | {"model": model | {"name": "gone"}})
    assert refused(f"run={run}", "scenario=1").startswith("error: unknown model or folder 'gone'")
    other = model | {"_target_": "rap_env.llm.loading.load_other"}
    run = changed(folder / "groups", tmp_path / "renamed", config=groups["config"] | {"model": other})
    assert "would call rap_env.llm.loading.load_other, which no file in conf/ names" in refused(
        f"run={run}", "scenario=1"
    )


def test_a_model_that_is_not_what_it_was_is_refused_with_what_changed(groups, folder, refused, tmp_path):
    then = groups["provenance"]
    platform = then["numeric_platform"] | {"threads": 64}
    older = then | {"model_digest": "0" * 64, "numeric_platform": platform}
    said = refused(f"run={changed(folder / 'groups', tmp_path / 'run', provenance=older)}", "scenario=1")
    assert said.endswith(f"changed since: threads (64 then, {then['numeric_platform']['threads']} now)")
    older = then | {"model_digest": "0" * 64}
    said = refused(f"run={changed(folder / 'groups', tmp_path / 'files', provenance=older)}", "scenario=1")
    assert said.endswith("changed since: the model's files")
    other = groups["config"] | {"calibration": groups["config"]["calibration"] | {"seed": 1}}
    said = refused(f"run={changed(folder / 'groups', tmp_path / 'seed', config=other)}", "scenario=1")
    assert "the model is not what it was in the run of" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run=x", "model=tiny"], "run says which model: leave model, granularity and dtype out"),
        (["run=x", "scenario=1", "mask=x"], "expected mask=FILE, or run=FOLDER and scenario=N"),
        (["model=tiny"], "expected mask=FILE, or run=FOLDER and scenario=N"),
        (["scenario=1"], "expected mask=FILE, or run=FOLDER and scenario=N"),
        (["mask=x", "scenario=1"], "expected mask=FILE, or run=FOLDER and scenario=N"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, refused, capsys):
    refused(*options)
    assert message in capsys.readouterr().err


def test_a_run_is_served_with_its_parts_in_its_order_and_its_policy(groups, folder, monkeypatch):
    given = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **_options: given.append(app))
    serve([f"run={folder / 'groups'}", "budget_bytes=100_000_000"])
    with TestClient(given[0]) as client:
        body = {"model": "random-llama", "prompt": "Hello", "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == 200
    with pytest.raises(SystemExit, match="expected the folder of a finished run"):
        serve([f"run={folder / 'nothing'}"])
