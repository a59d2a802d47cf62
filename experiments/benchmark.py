"""Benchmarks of the evaluation engine: `python -m experiments.benchmark parts=[gsi]`; see conf/benchmark.yaml."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.benchmarks import env, gsi, memory, population, scaling, scoring
from experiments.evaluators import Halves
from experiments.progress import Phases
from experiments.recipes.build import build_corpus, build_halves, build_windows, plain
from experiments.recipes.refusals import refusing_in_one_line
from experiments.records import provenance, write_record
from rap_env.errors import UnknownName
from rap_env.importance.gsi import greedy_sequential_importance
from rap_env.importance.source import ImportanceSource


class Bench:
    """Builds what the parts share, when it is first needed.

    Args:
        config: The composed config.
    """

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self._options = plain(config)
        self._llm = instantiate(config.model)
        self._order: tuple[str, ...] | None = None

    def gsi(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        return gsi.measure(self._llm, self._windows, gsi.GsiOptions(**self._options["gsi"]), progress)

    def scoring(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        chosen = {name: self._options["evaluation"][name] for name in ("tasks", "include_path", "limit")}
        options = scoring.ScoringOptions(**chosen, **self._options["scoring"])
        return scoring.measure(self._llm, instantiate(self._config.model, dtype="float32"), options, progress)

    def population(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        return population.measure(self._llm, self._evaluator(), self._ranking(), self._options["population"], progress)

    def env(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        importance = ImportanceSource(self._ranking())
        return env.measure(self._llm, self._evaluator(), importance, self._options["env"], progress)

    def scaling(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        return scaling.measure(self._llm, self._options["scaling"], progress)

    def memory(self, progress: Callable[[int, int], None]) -> dict[str, Any]:
        return memory.measure(self._llm, self._windows(0), self._evaluator().plan(self._llm).pairs, progress)

    def provenance(self) -> dict[str, Any]:
        return provenance() | {"model_digest": self._llm.digest}

    def _evaluator(self):
        return self._halves().search

    def _halves(self) -> Halves:
        return build_halves(self._config.evaluation, self._llm)

    def _windows(self, seed: int):
        corpus = build_corpus(self._config, self._halves().search_text)
        return build_windows(self._config, corpus, self._llm, seed)

    def _ranking(self) -> tuple[str, ...]:
        if self._order is None:
            self._order = greedy_sequential_importance(self._llm, self._windows(0), removals=20).order
        return self._order


PARTS = {"gsi": gsi, "scoring": scoring, "population": population, "env": env, "scaling": scaling, "memory": memory}


def run(config: DictConfig) -> list[Path]:
    """Runs the parts that the config names and writes one record for each.

    Raises:
        UnknownName: There is no such part.
        RapError: Bad input.
    """
    for name in config.parts:
        if name not in PARTS:
            raise UnknownName("benchmark part", name, PARTS)
    folder = Path(HydraConfig.get().runtime.output_dir)
    bench, paths = Bench(config), []
    for name in config.parts:
        with Phases() as phases:
            results = getattr(bench, name)(phases.start(name))
        record = {"config": plain(config), "provenance": bench.provenance(), "results": results}
        paths.append(write_record(folder / f"{name}.json", record))
        print("\n".join([f"## {name}", *PARTS[name].lines(results), f"record: {paths[-1]}"]), flush=True)
    return paths


@hydra.main(version_base="1.3", config_path="../conf", config_name="benchmark")
def main(config: DictConfig) -> None:
    with refusing_in_one_line():
        run(config)


if __name__ == "__main__":
    main()
