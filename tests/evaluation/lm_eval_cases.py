"""Small lm-eval tasks in folders, and what lm-eval itself says of them."""

import json
from collections.abc import Sequence
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from rap_env.llm.switchable import SwitchableLLM
from rap_env.rng import isolated_rng

YAML = """task: {name}
output_type: {output_type}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/{name}.jsonl}}, cache_dir: {folder}/cache}}
validation_split: validation
target_delimiter: "{delimiter}"
metric_list:
"""
CHOICES = "doc_to_text: question\ndoc_to_choice: choices\ndoc_to_target: gold\n"
AGGREGATIONS = {"mcc": "matthews_corrcoef", "f1": "f1", "brier_score": "brier_score"}  # of others the mean
METRIC = "  - {{metric: {0}, aggregation: {1}, higher_is_better: true}}\n"


def write_task(
    folder: Path,
    name: str,
    rows: Sequence[dict],
    metrics: Sequence[str] = ("acc", "acc_norm"),
    delimiter: str = " ",
) -> Path:
    """A multiple-choice task over rows of `question`, `choices` and `gold`; returns the folder."""
    write_rows(folder, name, rows)
    text = YAML.format(name=name, output_type="multiple_choice", folder=folder, delimiter=delimiter)
    text += "".join(METRIC.format(metric, AGGREGATIONS.get(metric, "mean")) for metric in metrics)
    (folder / f"{name}.yaml").write_text(f"{text}{CHOICES}metadata: {{version: 1.0}}\n")
    return folder


def write_rows(folder: Path, name: str, rows: Sequence[dict]) -> None:
    """A task's data set."""
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def hf(llm: SwitchableLLM) -> HFLM:
    """lm-eval's own HF adapter on the model as it is switched, one request at a time."""
    return HFLM(pretrained=llm.model, tokenizer=llm.tokenizer, batch_size=1)


def by_lm_eval(lm, tasks: Sequence[str], folder: Path, **options) -> tuple[dict[str, dict], dict[str, list]]:
    """Metrics by task, and the responses to each task's requests, of `simple_evaluate`."""
    with isolated_rng():
        results = lm_eval.simple_evaluate(
            lm,
            tasks=list(tasks),
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            num_fewshot=0,
            bootstrap_iters=0,
            verbosity="ERROR",
            **options,
        )
    metrics = {
        task: {name.removesuffix(",none"): value for name, value in found.items() if name.endswith(",none")}
        for task, found in results["results"].items()
    }
    metrics = {task: {k: v for k, v in found.items() if "stderr" not in k} for task, found in metrics.items()}
    responses = {
        task: [response[0] for sample in sorted(samples, key=lambda s: s["doc_id"]) for response in sample["resps"]]
        for task, samples in results["samples"].items()
    }
    return metrics, responses


def log_likelihoods(responses: Sequence) -> list[float]:
    return [float(response[0]) for response in responses]
