"""Systems serve a trace under a memory limit that moves: `python -m experiments.serve`; see conf/serve.yaml."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from agents.driver import run_search
from agents.orders import PricedGsiAgent
from experiments.progress import phase
from experiments.recipes.build import Parts, build, check_values, plain
from experiments.recipes.folder import claimed
from experiments.recipes.refusals import refusing_in_one_line
from experiments.recipes.run import search_task
from experiments.records import model_provenance, provenance, write_record
from experiments.report.serving import SERVING_TABLES, serving_picture
from experiments.serving.child import Enforcement, run_limited
from experiments.serving.finished import keep, kept
from experiments.serving.requests import dense_log_likelihoods, requests_of
from experiments.serving.scores import scores_at_masks
from experiments.serving.summary import summary
from experiments.serving.systems import System, systems_of
from rap_env.errors import InvalidConfig, RecordExists
from rap_env.files import write_over
from rap_env.mask import PruningMask
from rap_env.memory.footprint import activation_bytes, dense_bytes
from rap_env.memory.workload import Workload
from rap_env.policies import load_policy, save_policy
from rap_env.serving.memory_traces import MemoryTrace, memory_trace

_RECORD = "serve.json"


def run(config: DictConfig) -> None:
    """Ranks components, lets each system serve, and writes one record, a table and a picture.

    A run that was killed is run again in its folder: systems that have served, by the same commit, don't serve again.

    Raises:
        RecordExists, FolderInUse: The folder holds a record, or another run works in it.
        RapError: Bad input.
    """
    check_values(config)
    folder = Path(HydraConfig.get().runtime.output_dir)
    systems = systems_of(config.systems, config.policies)
    with claimed(folder):
        if (folder / _RECORD).exists():
            raise RecordExists(f"{folder / _RECORD} exists, and records are written once; name another folder")
        parts = build(config, HydraConfig.get().runtime.choices.evaluation)
        llm, memory = parts.search.llm, memory_trace(config.memory.kind, **config.memory.settings)
        requests = requests_of(config, llm)
        spec = _spec(config, parts, memory, requests, _policies(config, parts, folder))
        source = provenance() | model_provenance(llm, parts.corpus.digest)
        spec["commit"] = source["git"]
        dense = dense_log_likelihoods(llm, requests)
        found = {name: _serve(name, system, spec, config, folder) for name, system in systems.items()}
        reports = dict(list(parts.reports.items())[1:])
        whole = [PruningMask.all_kept(llm.shape)]
        results = {
            "dense_scores": {name: each.meter.evaluate(whole)[0].score for name, each in reports.items()},
            "whole_bytes": spec["whole_bytes"],
            "memory": spec["memory"],
            "systems": {
                name: {
                    "system": systems[name].as_dict(),
                    **summary(each, requests, dense, config.limits.window_seconds),
                    "scores": scores_at_masks(each["lines"], reports),
                }
                for name, each in found.items()
            },
        }
        record = {"config": plain(config), "provenance": source, "results": results}
        path = write_record(folder / _RECORD, record)
        tables = [line for table in SERVING_TABLES.values() for line in ("", *table(record).markdown)]
        picture = serving_picture(record, folder / "serve.png")
        print("\n".join([*tables, "", f"picture: {picture}", f"record: {path}"]), flush=True)


def _whole_bytes(config: DictConfig, shape) -> int:
    """What the dense model takes for the reference batch, activations included."""
    batch_size, tokens = config.memory.reference
    read = activation_bytes(shape, PruningMask.all_kept(shape), config.options.read_tokens, batch_size)
    return dense_bytes(shape, Workload(batch_size, tokens)) + read


def _policies(config: DictConfig, parts: Parts, folder: Path) -> dict[str, str]:
    """Folders of policies by name; the greedy one is measured here.

    Raises:
        InvalidConfig: One was made for other components.
        PolicyUnreadable: A folder holds none.
    """
    known = {name: str(Path(path).expanduser().resolve()) for name, path in config.policies.items()}
    names = [component.name for component in parts.search.llm.shape.components]
    for name, path in known.items():
        if [component.name for component in load_policy(path).shape.components] != names:
            raise InvalidConfig(
                f"policies.{name}: expected a policy over the model's parts in their order here; {path} is not"
            )
    with phase("ranking") as progress:
        greedy = run_search(PricedGsiAgent(), search_task(config, parts, progress=progress)).policy
    return known | {"greedy": str(save_policy(greedy, folder / "policies" / "greedy").resolve())}


def _spec(config, parts: Parts, memory: MemoryTrace, requests, policies: Mapping[str, str]) -> dict[str, Any]:
    """What a system's process needs to know, but for the system."""
    whole_bytes = _whole_bytes(config, parts.search.llm.shape)
    longest = config.trace.longest_prompt + config.trace.longest_generated
    lowest_bytes = int(min(memory.shares) * whole_bytes * (1 - config.limits.margin))
    return {
        "config": plain(config),
        "whole_bytes": whole_bytes,
        "mapped_bytes": parts.search.llm.shape.weight_bytes,
        "memory": {"seconds": list(memory.seconds), "n_bytes": list(memory.n_bytes(whole_bytes))},
        "requests": requests,
        "policies": dict(policies),
        "options": plain(config.options),
        "limits": plain(config.limits),
        "coarse_step": config.coarse_step,
        "static": {
            "workload": {"batch_size": config.static_batch, "prompt_tokens": longest},
            "budget_bytes": lowest_bytes,
        },
    }


def _serve(name: str, system: System, spec: Mapping[str, Any], config: DictConfig, folder: Path) -> dict[str, Any]:
    """What a system's process wrote, and what its watchdog saw."""
    spec = {**spec, "system": system.as_dict()}
    spec_path, result_path, outcome_path = (folder / f"{name}.{end}" for end in ("spec.json", "jsonl", "outcome.json"))
    outcome = kept(outcome_path, spec)
    if outcome is None:
        write_over(spec_path, json.dumps(spec))
        print(f"{name}: {len(spec['requests'])} requests over {spec['requests'][-1]['seconds']:.0f} s", flush=True)
        command = [sys.executable, "-m", "experiments.serving.replay", str(spec_path), str(result_path)]
        outcome = run_limited(command, _limit(spec).limit(1), _enforcement(spec, config))
        keep(outcome_path, spec, outcome)
    print(f"{name}: {outcome.kill or f'ended with {outcome.exit_code}'}", flush=True)
    lines = [json.loads(line) for line in result_path.read_text(encoding="utf-8").splitlines()]
    return {"lines": lines, "outcome": outcome}


def _limit(spec: Mapping[str, Any]) -> MemoryTrace:
    return MemoryTrace(tuple(spec["memory"]["seconds"]), tuple(spec["memory"]["n_bytes"]))


def _enforcement(spec: Mapping[str, Any], config: DictConfig) -> Enforcement:
    return Enforcement(
        highest_bytes=max(spec["memory"]["n_bytes"]),
        grace_seconds=config.memory.grace_seconds,
        ready_seconds=300.0,
        longest_seconds=config.longest_seconds,
        mapped_bytes=spec["mapped_bytes"],
    )


@hydra.main(version_base="1.3", config_path="../conf", config_name="serve")
def main(config: DictConfig) -> None:
    with refusing_in_one_line():
        run(config)


if __name__ == "__main__":
    main()
