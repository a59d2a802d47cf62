"""Benchmarks of the evaluation engine: `python -m experiments.benchmark parts=[gsi]`; see conf/benchmark.yaml."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.benchmarks import part
from experiments.benchmarks.bench import Bench
from experiments.progress import phase
from experiments.recipes.build import plain
from experiments.recipes.folder import claimed
from experiments.recipes.refusals import refusing_in_one_line
from experiments.records import provenance, write_record
from rap_env.errors import RecordExists


def run(config: DictConfig) -> None:
    """Runs the parts that the config names and writes one record for each.

    Raises:
        UnknownName: There is no such part.
        RecordExists, FolderInUse: The folder holds a part's record, or another benchmark works in it.
        RapError: Bad input.
    """
    parts = {name: part(name) for name in config.parts}
    folder = Path(HydraConfig.get().runtime.output_dir)
    with claimed(folder):
        if there := [name for name in parts if (folder / f"{name}.json").exists()]:
            raise RecordExists(f"{folder / there[0]}.json exists, and records are written once; leave the part out")
        bench = Bench(config)
        for name, module in parts.items():
            with phase(name) as progress:
                results = module.measure(bench, progress)
            source = provenance() | {"model_digest": bench.llm.digest}
            record = {"config": plain(config), "provenance": source, "results": results}
            path = write_record(folder / f"{name}.json", record)
            print("\n".join([f"## {name}", *module.lines(results), f"record: {path}"]), flush=True)


@hydra.main(version_base="1.3", config_path="../conf", config_name="benchmark")
def main(config: DictConfig) -> None:
    with refusing_in_one_line():
        run(config)


if __name__ == "__main__":
    main()
