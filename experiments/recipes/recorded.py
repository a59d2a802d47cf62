"""A finished run, read again: the model as it had it, and the masks that it reported."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

import conf
from experiments.recipes.build import build_llm
from experiments.recipes.folder import RECORD_NAME
from experiments.records import dense_scores, model_provenance, provenance, read_record
from rap_env.calibration import Corpus
from rap_env.errors import RapError, RunUnreadable
from rap_env.export.save import read_mask
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.policies import Policy, load_policy
from rap_env.reading import reading

_FORMATS = ("weights", "kv_cache")
_BUILT_FROM = ("model", "evaluation", "calibration", "workload")  # groups of conf/
_NOT_BUILT = ("agent", "tracker")  # entries of a config that nothing is made of here
_CALL = re.compile(r"_target_[:=]\s*([\w.]+)")


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
    with reading(path, "the record of a run", RunUnreadable):
        dropped = None if mask else _dropped(record["results"], scenario, path)
    llm = _built(record, path, quantised=False)
    if mask:
        return llm, read_mask(llm, mask)
    with reading(path, "the record of a run of this model", RunUnreadable):
        return llm, PruningMask.all_kept(llm.shape).drop(*dropped)


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
        dense = {name: dense_scores(results, name) for name in results["evaluators"]}
        known = "\n".join(
            _line(number, row, {name: scores[number - 1] for name, scores in dense.items()})
            for number, row in enumerate(rows, 1)
        )
        got = "none" if scenario is None else scenario
        raise RunUnreadable(f"expected scenario=1 to {len(rows)}, or mask=FILE; got {got}. {path} reports on\n{known}")
    return rows[scenario - 1]["dropped"]


def _line(number: int, row: Mapping[str, Any], dense: Mapping[str, float]) -> str:
    workload = f"{row['batch_size']} x {row['prompt_tokens']}+{row['generated_tokens']} tokens{_of_kind(row)}"
    scores = (
        f"{report['score']:.4f} on {name} ({dense[name] - report['score']:.4f} below dense)"
        for name, report in row["reports"].items()
    )
    budget = f"{row['budget_bytes']:,} bytes ({row['budget_ratio']:.0%} of dense{', exceeded' * row['violation']})"
    return f"  scenario={number}: {workload} in {budget}, {len(row['dropped'])} dropped; score {', '.join(scores)}"


def _of_kind(row: Mapping[str, Any]) -> str:
    return f" of {row['kind']}" if row.get("kind") else ""


def _built(record: Mapping[str, Any], path: Path, quantised: bool) -> SwitchableLLM:
    with reading(path, "the record of a run", RunUnreadable):
        config = OmegaConf.create(record["config"])
        formats = {name: record["config"].get("model", {}).get(name, "full") for name in _FORMATS}
    for name, chosen in formats.items():
        if not quantised and chosen != "full":
            raise RunUnreadable(
                f"expected a run with the weights and KV cache of its checkpoint, which exports hold; {path} is of"
                f" model.{name}={chosen}: run it again with model.{name}=full"
            )
    llm, corpus = rebuilt_model(config, path)
    with reading(path, "the record of a run", RunUnreadable):
        changes = changes_since(record["provenance"], llm, corpus)
    if changes:
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
    _check_calls(OmegaConf.to_container(config, resolve=False), source)
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
    except RapError:
        raise
    except Exception as error:  # whatever values of other types lead to
        reason = f"{type(error).__name__}: {error}"
        raise RunUnreadable(f"the model can't be built from the config in {source}: {reason}") from error


@functools.cache
def _known_calls() -> frozenset[str]:
    """What the YAML files of the groups that a model and its text are built from call."""
    files = (file for group in _BUILT_FROM for file in (Path(conf.__file__).parent / group).glob("*.yaml"))
    return frozenset(name for file in files for name in _CALL.findall(file.read_text(encoding="utf-8")))


def _check_calls(value: Any, source: Path, key: str = "") -> None:
    """Refuses a config that would call anything else: a record may come from anybody.

    Raises:
        RunUnreadable: It names another function, asks for a repository's own code, or looks things up when it is read.
    """
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for name, each in value.items():
            if key or name not in _NOT_BUILT:
                _check_calls(each, source, f"{key}.{name}" if key else str(name))
        return
    last = key.rpartition(".")[2]
    if last == "_target_" and value not in _known_calls():
        problem = f"would call {str(value)[:80]}, which no file in conf/ names for a model or its text"
    elif last == "trust_remote_code" and value:
        problem = "asks for code of the model's repository"
    elif isinstance(value, str) and "${" in value:
        problem = f"holds {value[:80]!r}, to be looked up when it is read"
    else:
        return
    raise RunUnreadable(f"{source}: {key} of the config {problem}; records are not trusted with that")


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
