"""Rerankers compared by seconds, memory and what they find: `python -m experiments.rerank`; see conf/rerank.yaml."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.progress import phase
from experiments.recipes.build import plain
from experiments.recipes.folder import claimed
from experiments.recipes.refusals import refusing_in_one_line
from experiments.records import model_provenance, provenance, write_record
from experiments.report.gamma import gamma_by_layer
from experiments.report.reranking import RERANKING_TABLES, gamma_picture, trade_off_picture
from experiments.rerank_training.data import Collection, load_collection, split_queries
from experiments.rerank_training.evaluation import ndcg
from experiments.reranking.answers import Plan, ask_all
from experiments.reranking.paths import paths_of
from experiments.reranking.process import Process
from experiments.reranking.ranker import load_reranker_llm
from experiments.reranking.recorded import recorded_paths
from experiments.reranking.requests import Request, packaged_collection, requests_of
from experiments.reranking.summary import Judges, summary
from experiments.reranking.systems import HEADS, MARGINS, System, systems_of
from experiments.reranking.thresholds import lowest_margins, lowest_threshold
from rap_env.errors import InvalidConfig, RecordExists
from rap_env.files import write_over
from rap_env.llm.loading import load_llm
from rap_env.rerank import ClusterRule
from rap_env.rerank.margins import score_noise

_RECORD = "rerank.json"
_CONFIG = "config.json"
_WEIGHTS = "weights"
_LOADED = (
    *("model_name", "dtype", "adapter", "template", "max_document_tokens", "rule", "bounds"),
    *("batch_size", "kept_channels", "n_heads"),
)


class Comparison:
    """One comparison in its folder.

    Args:
        config: As plain values.
        folder: For answers, record, tables and pictures; what an earlier run of the same config left is used.

    Raises:
        InvalidConfig: There are too few queries or documents, or an earlier run in the folder had another config.
    """

    def __init__(self, config: Mapping[str, Any], folder: Path) -> None:
        self._config, self._folder = config, folder
        systems = systems_of(config["systems"])
        self.left_out = {name: each.missing_package for name, each in systems.items() if each.missing_package}
        self._systems = {name: each for name, each in systems.items() if name not in self.left_out}
        self._collection = _collection(config)
        training, report = _split(config, self._collection)
        self._requests = requests_of(self._collection, [*training, *report], max(config["candidates"]))
        self._training = range(len(training))
        self._report = range(len(training), len(self._requests))
        self._noise: dict[bool, np.ndarray] = {}  # of each layer, by whether the model is masked; see `score_noise`
        _check_same(folder / _CONFIG, config)

    def results(self) -> dict[str, Any]:
        """Asks everything that has no answer yet, and sums up."""
        full = self._paths(System(), self._report)
        thresholds = self._thresholds()
        config = self._config
        plan = Plan(self._report, config["candidates"], config["top_k"], config["repeats"], thresholds)
        with phase("requests") as progress:
            answers, failed = ask_all(self._systems, plan, self._start, self._folder, progress)
        judges = Judges(self._requests, self._full_orders(full), self._collection.grades)
        whole = {name: each for name, each in answers.items() if name not in failed}
        return {
            "systems": {name: summary(each, judges, config["top_k"]) for name, each in whole.items()},
            "bm25": self._bm25(),
            "left_out": self.left_out | failed,
            "catches_peaks": all(each["catches_peaks"] for own in whole.values() for each in own),
            "thresholds": [
                {"rule": rule, "masked": masked, "candidates": n, "top_k": k, "threshold": threshold}
                for (rule, masked, n, k), threshold in thresholds.items()
            ],
            "gamma": [_numbers(gamma_by_layer(full[number]["path"])) for number in self._report],
            "prompt_tokens_behind_the_query": mean(t for number in self._report for t in full[number]["tokens"]),
        }

    def _bm25(self) -> list[dict[str, Any]]:
        """NDCG@10 of the candidates in the order in which BM25 found them."""
        found = []
        for candidates in self._config["candidates"]:
            asked = [self._requests[number] for number in self._report]
            names = {each.name: itertools.islice(each.documents, candidates) for each in asked}
            run = {query: {name: -float(place) for place, name in enumerate(own)} for query, own in names.items()}
            found.append({"candidates": candidates, "ndcg_at_10": mean(ndcg(self._collection.grades, run).values())})
        return found

    def remove_weights(self) -> None:
        """Removes the files that systems read their weights from; each has a copy of the model."""
        shutil.rmtree(self._folder / _WEIGHTS, ignore_errors=True)

    @property
    def digest(self) -> str:
        """Of all requests."""
        texts = [text for each in self._requests for text in (each.query, *each.documents.values())]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()

    def _paths(self, system: System, numbers: Sequence[int]) -> dict[int, Mapping[str, Any]]:
        name = "masked" if system.masks else "full"
        candidates = max(self._config["candidates"])
        with phase(f"paths, {name}") as progress:
            return paths_of(
                numbers,
                candidates,
                lambda: self._process(f"paths.{name}", system),
                self._folder / f"paths.{name}",
                progress,
            )

    def _thresholds(self) -> dict[tuple[str, bool, int, int], float]:
        """Of each rule and each model that is pruned: a masked one is held against its own full reading."""
        found, config = {}, self._config
        pruned = sorted({(each.masks, each.prunes) for each in self._systems.values() if each.prunes})
        paths = {masks: self._training_paths(masks) for masks in {masks for masks, _rule in pruned}}
        self._noise = {masks: score_noise(paths[masks]) for masks, rule in pruned if rule == MARGINS}
        sizes, top_ks, target = config["candidates"], config["top_k"], config["target"]
        for masks, rule in pruned:
            if rule == MARGINS:  # one for all, as it ships with an adapter
                needed = lowest_margins(self._noise[masks], paths[masks], sizes, top_ks, target)
                found |= {(rule, masks, *setting): max(needed.values()) for setting in needed}
                continue
            for candidates, k in itertools.product(sizes, top_ks):
                known = [path[:, :candidates] for path in paths[masks]]
                published = ClusterRule(0.0, **config["rule"])
                found[rule, masks, candidates, k] = lowest_threshold(published, known, k, target)
        return found

    def _training_paths(self, masks: bool) -> list[np.ndarray]:
        """Of the calibration queries, each [layers, n]."""
        config = self._config
        if config["paths"] is None or masks:
            paths = self._paths(System(masks=masks), self._training)
            return [paths[number]["path"] for number in self._training]
        digest = load_reranker_llm(config).digest
        source = {"model_digest": digest, "document_tokens": config["max_document_tokens"]}
        names = [self._requests[number].name for number in self._training]
        return recorded_paths(config["paths"], names, max(config["candidates"]), source)

    def _full_orders(self, full: Mapping[int, Mapping[str, Any]]) -> dict[tuple[int, int], list[int]]:
        return {
            (number, candidates): np.argsort(-full[number]["path"][-1, :candidates], kind="stable").tolist()
            for number in self._report
            for candidates in self._config["candidates"]
        }

    def _start(self, name: str) -> Process:
        return self._process(name, self._systems[name])

    def _process(self, name: str, system: System) -> Process:
        requests = [{"query": each.query, "documents": list(each.documents.values())} for each in self._requests]
        return Process(name, self._spec(system), requests, self._folder / f"{name}.log")

    def _spec(self, system: System) -> dict[str, Any]:
        loaded = {key: self._config[key] for key in _LOADED}
        training = self._training if system.reads == HEADS else []
        examples = [self._example(self._requests[number]) for number in training]
        noise = self._noise[system.masks].tolist() if system.prunes == MARGINS else None
        own = {"system": system.as_dict(), "examples": examples, "noise": noise}
        return {**loaded, **own, "folder": str(self._folder / _WEIGHTS)}

    def _example(self, request: Request) -> dict[str, Any]:
        """A calibration query with the fewest candidates that are asked for, as the heads are chosen on it."""
        grades = self._collection.grades[request.name]
        documents = dict(itertools.islice(request.documents.items(), min(self._config["candidates"])))
        relevant = [grades.get(name, 0) > 0 for name in documents]
        return {"query": request.query, "documents": list(documents.values()), "relevant": relevant}


def _collection(config: Mapping[str, Any]) -> Collection:
    return packaged_collection(config["seed"]) if config["data"] is None else load_collection(config["data"])


def _split(config: Mapping[str, Any], collection: Collection) -> tuple[Sequence[str], Sequence[str]]:
    n_training, n_report = config["calibration_queries"], config["report_queries"]
    if min(n_training, n_report) < 1 or n_training + n_report > len(collection.queries):
        raise InvalidConfig(
            f"expected at least 1 calibration query and 1 report query, of {len(collection.queries)} queries;"
            f" got {n_training} and {n_report}"
        )
    split = split_queries(list(collection.queries), 0, n_report, config["seed"])
    return split.training[:n_training], split.report


def _check_same(path: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InvalidConfig(f"{path} is of a run with another config; name another folder (hydra.run.dir=...)")
    write_over(path, text)


def _numbers(values: Sequence[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [None if np.isnan(value) else value for value in values]


def run(config: DictConfig) -> None:
    """Compares, and writes one record, the table and the pictures.

    Raises:
        RecordExists, FolderInUse: The folder holds a record, or another run works in it.
        RapError: Bad input.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    with claimed(folder):
        if (folder / _RECORD).exists():
            raise RecordExists(f"{folder / _RECORD} exists, and records are written once; name another folder")
        comparison = Comparison(plain(config), folder)
        for name, package in comparison.left_out.items():
            install = f"pip install {package.replace('_', '-')}"
            print(f"{name} is left out: its package is not installed; {install}", flush=True)
        results = comparison.results()
        source = provenance() | model_provenance(load_llm(config.model_name, config.dtype, "cpu"), comparison.digest)
        record = {"config": plain(config), "provenance": source, "results": results}
        path = write_record(folder / _RECORD, record)
        comparison.remove_weights()
        pictures = [trade_off_picture(record, folder / "rerank.png"), gamma_picture(record, folder / "gamma.png")]
        tables = [line for table in RERANKING_TABLES.values() for line in ("", *table(record).markdown)]
        failed = [f"{name} is left out: {why}" for name, why in results["left_out"].items()]
        print("\n".join([*tables, "", *failed, *(f"picture: {each}" for each in pictures), f"record: {path}"]))


@hydra.main(version_base="1.3", config_path="../conf", config_name="rerank")
def main(config: DictConfig) -> None:
    with refusing_in_one_line():
        run(config)


if __name__ == "__main__":
    main()
