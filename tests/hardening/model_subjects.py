"""Everything that reads models, what belongs to them, tasks and configs: how valid ones are made, and read."""

import functools
import os
import warnings
from pathlib import Path
from unittest import mock

import peft
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from experiments.recipes.build import check_values, plain
from experiments.recipes.recorded import recorded_model
from experiments.records import model_provenance, provenance, write_record
from rap_env.errors import InvalidConfig
from rap_env.evaluation import task_loading
from rap_env.evaluation.task_loading import build_requests, load_tasks
from rap_env.export.save import export_pruned
from rap_env.llm import parts
from rap_env.llm.loading import build_random_llm, build_tiny_llm, load_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.rerank.adapter import merge_adapter
from rap_env.rng import isolated_rng
from rap_env.widths.prepare import WidthRecipe, prepare_widths
from tests.evaluation.lm_eval_cases import write_task
from tests.experiments.comparison_records import row
from tests.export.cases import PAIRS, cut_llm, llm_with_merges
from tests.hardening.fuzzing import REFUSED, Subject
from tests.llm.test_parts import GROUP, MEMBERS

_CONF = Path(__file__).parents[2] / "conf"
_OVERRIDES = "experiment=smoke\nagent=ppo\nseed=3\nworkload.search.budget_ratios=[0.8, 0.7]\n+new.key={a: 1}\n"
_WINDOWS = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(4))
_TOKENS = torch.tensor([[5, 77, 130, 9, 200, 31]])


def _save_model(folder: Path) -> None:
    llm = build_tiny_llm()
    llm.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)


def _load(folder: Path) -> None:
    load_llm(str(folder), dtype="float32", device="cpu")


@mock.patch.object(parts, "GROUP_CHANNELS", GROUP)
def _export(folder: Path, format: str, *dropped: str) -> None:
    llm = llm_with_merges("llama", PAIRS) if format == "gguf" else cut_llm("llama", PAIRS)
    mask = PruningMask.all_kept(llm.shape).drop(*dropped)
    folder.rmdir()  # an export's folder has to be new
    with mock.patch("sys.path", [*os.sys.path]):
        export_pruned(llm, mask, format, folder)


def _save_adapter(folder: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings(), isolated_rng(0):
        warnings.simplefilter("ignore", FutureWarning)
        peft.get_peft_model(build_tiny_llm().model, config).save_pretrained(folder)


@mock.patch.object(parts, "GROUP_CHANNELS", GROUP)
def grouped() -> SwitchableLLM:
    """A small model whose sites have parts."""
    whole = build_random_llm(*MEMBERS["llama, 2 KV heads"])
    return SwitchableLLM(whole.model, whole.tokenizer, "cut", "group")


@mock.patch.object(parts, "GROUP_CHANNELS", GROUP)
def _prepare(folder: Path) -> None:
    llm = grouped()
    with mock.patch.dict(os.environ, RAP_CACHE=str(folder)):
        prepare_widths(llm, _WINDOWS, WidthRecipe(compensation="ridge", ridge=0.1))
    half = [(own.stop - own.start) // 2 for _site, own in llm.shape.components.sites]
    with torch.inference_mode(), llm.pruned(PruningMask.from_widths(llm.shape, half)):
        llm.model(_TOKENS)


@functools.cache
def _tiny_logits() -> torch.Tensor:
    return build_tiny_llm().model(_TOKENS).logits.detach()


def _release(folder: Path) -> None:
    """Whatever lies there already, the weights are the model's."""
    llm = build_tiny_llm()
    store = WeightStore(llm, folder)
    store.switch(PruningMask.all_kept(llm.shape).drop("layer0.mlp", "layer2.attention"))
    store.switch(PruningMask.all_kept(llm.shape))
    with torch.inference_mode():
        assert torch.equal(llm.model(_TOKENS).logits, _tiny_logits())


def _write_task(folder: Path) -> None:
    case = folder.parent / "case"  # where it is read
    rows = [{"question": f"why {n}", "choices": ["a", "b"], "gold": n % 2} for n in range(4)]
    case.mkdir(exist_ok=True)
    text = (write_task(case, "toy", rows) / "toy.yaml").read_text()
    (folder / "toy.yaml").write_text(text.replace(f"{case}/cache", f"{folder.parent}/cache"))
    (folder / "toy.jsonl").write_bytes((case / "toy.jsonl").read_bytes())


# Without lm-eval's own tasks, which take seconds to index wherever a file names no task of its own.
@mock.patch.object(task_loading, "TaskManager", functools.partial(task_loading.TaskManager, include_defaults=False))
def _load_task(folder: Path) -> None:
    for name, task in load_tasks(["toy"], folder).items():
        build_requests(name, task, range(len(task.eval_docs)))


def _config(*overrides: str):
    with initialize_config_dir(str(_CONF), version_base="1.3"):
        return compose("config", list(overrides))


def tiny_run(folder: Path) -> None:
    """A record like that of a smoke run."""
    llm = build_tiny_llm()
    source = provenance() | model_provenance(llm, "0")
    results = {"rows": [row((1, 512), 0.9, 2.0, ["layer0.mlp"])], "dense": {"text": -2.0, "tasks": 0.5}}
    config = plain(_config("experiment=smoke"))
    write_record(folder / "record.json", {"config": config, "provenance": source, "results": results})


def _compose(folder: Path) -> None:
    """As the command line does; Hydra itself answers its own errors in a line."""
    try:
        check_values(_config(*(folder / "overrides.txt").read_text(encoding="utf-8", errors="replace").splitlines()))
    except (HydraException, OmegaConfBaseException) as error:
        raise InvalidConfig(str(error)) from error


MODELS = [
    Subject("model folder", _save_model, _load),
    Subject("GGUF", lambda folder: _export(folder, "gguf"), _load, "*.gguf"),
    Subject("HF export", lambda folder: _export(folder, "hf", "layer1.mlp", "layer1.attention"), _load),
    Subject("HF export with code", lambda folder: _export(folder, "hf", "layer1.mlp"), _load, expected=REFUSED),
    Subject("DeciLM export", lambda folder: _export(folder, "deci", "layer1.mlp"), _load, expected=REFUSED),
    Subject("adapter", _save_adapter, lambda folder: merge_adapter(build_tiny_llm(), folder)),
    Subject("refits", _prepare, _prepare),
    Subject("weight store", _release, _release, leaves=(".safetensors",)),
    Subject("lm-eval task", _write_task, _load_task),
    Subject("run", tiny_run, lambda folder: recorded_model(folder, 1)),
    Subject("overrides", lambda folder: (folder / "overrides.txt").write_text(_OVERRIDES), _compose),
]
