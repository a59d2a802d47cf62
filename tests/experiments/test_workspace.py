"""The W&B workspace shows metrics that runs log, and the sweep's options and objective are those of runs."""

import warnings
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from experiments.recipes.build import build_tracker
from experiments.report.closing import closing_metrics
from experiments.workspace import GROUPS, IMAGE, SECTIONS, TABLE, workspace
from scripts.wandb_workspace import main
from tests.experiments.test_amortisation import made

CONF = Path(__file__).parents[2] / "conf"
SWEEP = yaml.safe_load((CONF.parent / "scripts" / "wandb_sweep.yaml").read_text())


@pytest.fixture
def record() -> dict:
    one = made("table", 0, 100, (2.4, 2.8, 4.0, 5.0), 60)
    one["results"] |= {"objective": -2.5}
    one["results"]["rows"][0]["dropped"] = ["layer0.attention", "layer1.mlp", "layer2.mlp"]
    one["results"]["rows"][0]["best_evaluated"] = -2.0
    return one


@pytest.fixture
def library():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its own models are of pydantic's older form
        return pytest.importorskip("wandb_workspaces.workspaces")


def test_closing_metrics_are_those_computed_by_hand(record):
    metrics = closing_metrics(record)
    assert metrics["objective"] == -2.5
    assert metrics["held_out/loss_over_dense"] == pytest.approx(1.25 * 2.6 - 2.5)
    assert metrics["outside/loss_over_dense"] == pytest.approx(1.25 * 4.5 - 2.5)
    assert metrics["search/regret"] == pytest.approx(0.4 / 4), "one context of four missed what its search had found"
    assert (metrics["cost/tokens"], metrics["cost/evaluations_per_context"]) == (60, 3.0), "of 10 tokens, for two"
    assert (metrics["kept/attention"], metrics["kept/mlp"]) == (1 - 1 / 16, 1 - 2 / 16)
    assert metrics["violations"] == 0


def test_what_is_not_finite_is_no_metric(record):
    record["results"]["rows"][0]["violation"] = True
    for row in record["results"]["rows"]:
        row["best_evaluated"] = None
    metrics = closing_metrics(record)
    assert metrics["violations"] == 0.25 and "outside/loss_over_dense" in metrics
    assert not metrics.keys() & {"held_out/loss_over_dense", "search/regret"}


def test_sections_show_what_runs_log(record):
    of_driver = {"reward", "best_reward"}  # tests/agents/test_driver.py has them
    shown = {metric for metrics in SECTIONS.values() for metric in metrics}
    assert shown <= closing_metrics(record).keys() | of_driver


def test_trackers_that_take_a_config_are_told_agent_and_family(tmp_path, monkeypatch):
    told = {}
    monkeypatch.setattr(
        "experiments.tracking.WandbTracker.__init__", lambda self, folder, project, config: told.update(config)
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["tracker=wandb", "workload=family"])
    build_tracker(config, tmp_path, {"agent": "evopress", "workload": "family"})
    assert [told[name] for name in GROUPS] == ["family", "evopress"] and told["token_budget"] == config.token_budget


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_workspace_is_built_and_comes_back_from_what_the_server_keeps(library):
    built = workspace("someone", "rap")
    assert [section.name for section in built.sections] == list(SECTIONS)
    assert [group.name for group in built.runset_settings.groupby] == list(GROUPS)
    sent = built._to_model()
    again = library.Workspace._from_model(type(sent).model_validate_json(sent.model_dump_json(by_alias=True)))
    assert [section.name for section in again.sections] == list(SECTIONS)
    panels = {section.name: section.panels for section in again.sections}
    kinds = {name: [type(panel).__name__ for panel in of] for name, of in panels.items()}
    assert kinds["Amortisation"] == ["ScatterPlot", "LinePlot"]
    assert kinds["Kept widths"] == ["BarPlot", "BarPlot", "MediaBrowser", "WeavePanelSummaryTable"]
    for name in ("Regret", "Cost", "Kept widths"):
        shown = [panel.metrics[0].name for panel in panels[name] if type(panel).__name__ == "BarPlot"]
        assert shown == list(SECTIONS[name])
    assert (panels["Kept widths"][2].media_keys, panels["Kept widths"][3].table_name) == ([IMAGE], TABLE)


def test_saving_says_that_it_needs_a_server(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SystemExit, match="lies on a W&B server: set WANDB_API_KEY"):
        main(["someone", "rap"])


def test_every_run_of_the_sweep_composes_and_logs_its_objective(record):
    assert SWEEP["metric"] == {"name": "objective", "goal": "maximize"} and "objective" in closing_metrics(record)
    fixed = [part for part in SWEEP["command"] if "=" in part]
    ends = [("min", "max"), (0, -1)]
    for end in range(2):
        drawn = [
            f"{name}={of['values'][ends[1][end]] if 'values' in of else of[ends[0][end]]}"
            for name, of in SWEEP["parameters"].items()
        ]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", [*fixed, *drawn])
        assert config.tracker._target_.endswith("WandbTracker") and config.name == "wandb_sweep"
