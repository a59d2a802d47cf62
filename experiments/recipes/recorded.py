"""A finished run, read again: the model as it had it, and the masks that it reported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from experiments.recipes.build import build_llm
from experiments.recipes.folder import RECORD_NAME
from experiments.records import model_provenance, provenance, read_record
from rap_env.calibration import Corpus
from rap_env.errors import RapError, RunUnreadable
from rap_env.export.save import read_mask
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.policies import Policy, load_policy

_FORMATS = ("weights", "kv_cache")


def recorded_model(
    folder: Path, scenario: int | None = None, mask: Path | None = None
) -> tuple[SwitchableLLM, PruningMask]:
    """The model as a run had it, its parts ordered and refitted on the same text, and a mask over its components.

    Args:
        folder: The run's.
        scenario: Which of its reported scenarios the mask is of, counted from 1.
        mask: A file that `PruningMask.to_json` wrote, instead of a scenario.

    Raises:
        RunUnreadable: The folder holds no run's record, there is no such scenario, the weights or the KV cache are
            quantised, or the model can't be built again as it was.
        InvalidMask: The file holds no mask over the model's components.
        RapError: Whatever the config names is not to be had.
    """
    path, record = _record(folder)
    dropped = None if mask else _dropped(record["results"], scenario, path)
    llm = _built(record, path, quantised=False)
    return llm, read_mask(llm, mask) if mask else PruningMask.all_kept(llm.shape).drop(*dropped)


def recorded_policy(folder: Path) -> tuple[SwitchableLLM, Policy]:
    """The model as a run had it, and the policy that it ended with.

    Args:
        folder: The run's.

    Raises:
        RunUnreadable: As `recorded_model`, but that the model may be quantised.
        PolicyUnreadable: There is no policy beside the record.
        RapError: Whatever the config names is not to be had.
    """
    path, record = _record(folder)
    policy = load_policy(path.parent / "policy")
    return _built(record, path, quantised=True), policy


def _record(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder.expanduser() / RECORD_NAME
    try:
        return path, read_record(path)
    except (OSError, ValueError) as error:
        raise RunUnreadable(f"expected the folder of a finished run; can't read {path}: {error}") from error


def _dropped(results: Mapping[str, Any], scenario: int | None, path: Path) -> list[str]:
    """The components that the mask of a reported scenario drops."""
    if not (rows := results.get("rows")):
        raise RunUnreadable(f"expected a run's record with masks for its scenarios; {path} holds none")
    if scenario is None or not 1 <= scenario <= len(rows):
        known = "\n".join(_line(number, row, results["dense"]) for number, row in enumerate(rows, 1))
        got = "none" if scenario is None else scenario
        raise RunUnreadable(f"expected scenario=1 to {len(rows)}, or mask=FILE; got {got}. {path} reports on\n{known}")
    return rows[scenario - 1]["dropped"]


def _line(number: int, row: Mapping[str, Any], dense: Mapping[str, float]) -> str:
    workload = f"{row['batch_size']} x {row['prompt_tokens']}+{row['generated_tokens']} tokens"
    scores = (
        f"{report['score']:.4f} on {name} ({dense[name] - report['score']:.4f} below dense)"
        for name, report in row["reports"].items()
    )
    budget = f"{row['budget_bytes']:,} bytes ({row['budget_ratio']:.0%} of dense{', exceeded' * row['violation']})"
    return f"  scenario={number}: {workload} in {budget}, {len(row['dropped'])} dropped; score {', '.join(scores)}"


def _built(record: Mapping[str, Any], path: Path, quantised: bool) -> SwitchableLLM:
    for name in _FORMATS:
        chosen = record["config"].get("model", {}).get(name, "full")
        if not quantised and chosen != "full":
            raise RunUnreadable(
                f"expected a run with the weights and KV cache of its checkpoint, which exports hold; {path} is of"
                f" model.{name}={chosen}: run it again with model.{name}=full"
            )
    llm, corpus = rebuilt_model(OmegaConf.create(record["config"]), path)
    if changes := changes_since(record["provenance"], llm, corpus):
        raise RunUnreadable(f"the model is not what it was in the run of {path}; changed since: {changes}")
    return llm


def rebuilt_model(config: DictConfig, source: Path) -> tuple[SwitchableLLM, Corpus | None]:
    """What `build_llm` makes of a recorded config.

    Args:
        config: The record's.
        source: Where the record lies, for messages.

    Raises:
        RunUnreadable: The config lacks an entry, or its model can't be built.
        RapError: Whatever the config names is not to be had.
    """
    OmegaConf.set_struct(config, True)  # what is missing is an error
    try:
        return build_llm(config)
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise RunUnreadable(
            f"expected a config that the model can be built from; {source} has none for {error.full_key}"
        ) from error
    except InstantiationException as error:
        if isinstance(error.__cause__, RapError):
            raise error.__cause__ from None
        raise RunUnreadable(f"the model can't be built from the config in {source}: {error}") from error


def changes_since(then: Mapping[str, Any], llm: SwitchableLLM, corpus: Corpus | None) -> str:
    """Why a rebuilt model has another digest than a record's; empty where it has the same.

    Args:
        then: The record's provenance.
        llm: What `rebuilt_model` returned.
        corpus: The text that its parts are ordered on, if they are.
    """
    if llm.digest == then["model_digest"]:
        return ""
    now = provenance() | model_provenance(llm, then["corpus_digest"] if corpus is None else corpus.digest)
    return _changes(then, now)


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a model's digest depends on and is not as it was; its own files where all the rest is."""
    flat = [
        {
            "the calibration text": each["corpus_digest"],
            "the tokenizer": each["tokenizer_digest"],
            "engine": each["engine_version"],
            **{name: each["versions"].get(name) for name in ("torch", "transformers")},
            **each["numeric_platform"],
        }
        for each in (then, now)
    ]
    changed = {name: [of.get(name) for of in flat] for name in flat[0] | flat[1]}
    return (
        ", ".join(
            name if len(str(values)) > 60 else f"{name} ({values[0]} then, {values[1]} now)"
            for name, values in changed.items()
            if values[0] != values[1]
        )
        or "the model's files"
    )
