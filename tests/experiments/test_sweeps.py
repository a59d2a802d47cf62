"""Launchers and the sweeper of conf/hydra compose; Optuna searches what W&B's sweep searches, by the same objective.

Sweeps by joblib and Ray run in test_compare.py.
"""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from experiments.records import read_record

CONF = Path(__file__).parents[2] / "conf"
LAUNCHERS = {  # conf/hydra/launcher's, with the extra that each needs and what it makes of it
    "processes": ("hydra_joblib_launcher", "JoblibLauncher"),
    "ray_cluster": ("hydra_ray_launcher", "RayLauncher"),
    "slurm": ("hydra_submitit_launcher", "SlurmLauncher"),
}
SWEEP = yaml.safe_load((CONF.parent / "scripts" / "wandb_sweep.yaml").read_text())


def composed(*overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True).hydra


def test_every_launcher_is_tested():
    assert {path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")} == LAUNCHERS.keys()


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_composes_with_every_key_that_it_has(name):
    plugin, launcher = LAUNCHERS[name]
    pytest.importorskip(f"hydra_plugins.{plugin}", reason=f"{plugin.replace('_', '-')} is not installed")
    config = composed(f"hydra/launcher={name}")
    assert config.launcher._target_.rpartition(".")[2] == launcher


def test_optuna_draws_from_the_space_of_the_wandb_sweep():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `sweeps` is not installed")
    config = composed("hydra/sweeper=tuning").sweeper
    expected = {
        name: f"interval({of['min']}, {of['max']})" if "min" in of else f"choice({', '.join(map(str, of['values']))})"
        for name, of in SWEEP["parameters"].items()
    }
    assert config.params == expected
    assert config.direction == SWEEP["metric"]["goal"] and config.n_trials == SWEEP["run_cap"]


@pytest.mark.filterwarnings("ignore")  # of Optuna 2's own imports
def test_optuna_runs_trials_by_their_objective(tmp_path, train_here):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra `sweeps` is not installed")
    agent = ("agent=family_surrogate", "agent.answer.contexts=12", "model.granularity=group", "experiment=smoke")
    tuning = ("hydra/sweeper=tuning", "hydra.sweeper.n_trials=2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    said, code = train_here(tmp_path / "cache", "-m", *agent, *tuning)
    assert not code, said
    records = [read_record(tmp_path / "sweep" / str(trial) / "record.json") for trial in range(2)]
    assert records[0]["config"]["agent"]["hope"] != records[1]["config"]["agent"]["hope"]
    best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(record["results"]["objective"] for record in records)
