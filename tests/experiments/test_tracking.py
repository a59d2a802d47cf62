"""Trackers keep what they are told, the null tracker keeps nothing, and wandb works without a network."""

import json
import math
import struct
import subprocess
import sys

import numpy as np
import psutil
import pytest
from matplotlib.image import imread

from experiments.tracking import JsonlTracker, NoTracker, WandbTracker


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


@pytest.fixture
def no_wandb_account(tmp_path, monkeypatch) -> None:
    """Hides the user's account and settings from wandb, and keeps its caches out of the home folder."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_home"))


def services() -> list[str]:
    """Names of the processes that wandb has started from this one."""
    names = []
    for child in psutil.Process().children(recursive=True):
        if child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            names.append(child.name())
    return [name for name in names if "wandb" in name]


def metric_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def use_everything(tracker, rgb) -> None:
    with tracker:
        tracker.log(5, {"reward": np.float32(0.5), "explained_variance": math.nan})
        tracker.log(3, {"reward": 1})
        tracker.log_image("eval/mask", rgb)
        tracker.log_table("eval/masks", ["name", "score"], [["dense", np.float64(0.25)], ["empty", None]])
    tracker.close()


def test_metrics_are_one_flushed_line_each(tmp_path):
    tracker = JsonlTracker(tmp_path / "new" / "folder")
    tracker.log(5, {"reward": np.float32(0.5), "steps": np.int64(2)})
    assert metric_lines(tracker.folder) == [{"step": 5, "reward": 0.5, "steps": 2.0}], "before close"
    tracker.log(6, {"reward": -1})
    tracker.close()
    assert metric_lines(tracker.folder)[1] == {"step": 6, "reward": -1.0}


def test_metrics_stay_valid_json_where_a_number_is_not_finite(tmp_path):
    with JsonlTracker(tmp_path) as tracker:
        tracker.log(0, {"explained_variance": math.nan, "loss": math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "explained_variance": null, "loss": null}\n'


def test_metrics_of_a_run_that_goes_on_replace_those_of_the_killed_one(tmp_path):
    for step in range(2):
        with JsonlTracker(tmp_path) as tracker:
            tracker.log(step, {"reward": 0})
    assert [line["step"] for line in metric_lines(tmp_path)] == [1]


def test_images_are_exact_png_files_and_tables_json(tmp_path, rgb):
    use_everything(JsonlTracker(tmp_path), rgb)
    assert np.array_equal(np.round(imread(tmp_path / "eval" / "mask.png")[..., :3] * 255), rgb)
    assert json.loads((tmp_path / "eval" / "masks.json").read_text()) == {
        "columns": ["name", "score"],
        "rows": [["dense", 0.25], ["empty", None]],
    }


def test_name_outside_the_folder_is_refused(tmp_path, rgb):
    with (
        JsonlTracker(tmp_path / "run") as tracker,
        pytest.raises(ValueError, match=r"inside the tracker's folder; got '../mask'"),
    ):
        tracker.log_image("../mask", rgb)


def test_tracker_closes_when_the_run_fails(tmp_path):
    with pytest.raises(RuntimeError, match="run failed"), JsonlTracker(tmp_path) as tracker:
        raise RuntimeError("run failed")
    with pytest.raises(ValueError, match="closed file"):
        tracker.log(0, {})


def test_null_tracker_takes_everything_and_leaves_nothing(tmp_path, monkeypatch, rgb):
    monkeypatch.chdir(tmp_path)
    use_everything(NoTracker(), rgb)
    assert not list(tmp_path.iterdir())


def test_wandb_is_not_imported_until_its_tracker_is_built():
    code = "import sys, experiments.tracking; assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_tracker_works_offline_quietly_and_ends_its_service(tmp_path, rgb, capfd):
    folder = tmp_path / "run"
    tracker = WandbTracker(folder=folder, project="rap", config={"agent": {"name": "ppo"}}, name="first")
    assert services()
    use_everything(tracker, rgb)
    assert services() == []
    (run,) = (folder / "wandb").glob("offline-run-*")
    (image,) = (run / "files" / "media" / "images" / "eval").glob("mask_*.png")
    (table,) = (run / "files" / "media" / "table" / "eval").glob("masks_*.table.json")
    assert np.array_equal(np.round(imread(image)[..., :3] * 255), rgb)
    assert json.loads(table.read_text()) == {
        "columns": ["name", "score"],
        "data": [["dense", 0.25], ["empty", None]],
    }
    binary = next(run.glob("*.wandb")).read_bytes()
    assert b"explained_variance" in binary
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("no_wandb_account")
@pytest.mark.parametrize(
    ("variables", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k" * 40}, "online"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
    ],
)
def test_wandb_mode_follows_the_environment(tmp_path, monkeypatch, variables, mode):
    import wandb

    asked = {}
    real_init = wandb.init

    def init(**arguments):
        asked.update(arguments)
        return real_init(**arguments | {"mode": "disabled"})

    monkeypatch.setattr(wandb, "init", init)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    WandbTracker(folder=tmp_path, project="rap", config={}).close()
    assert asked["mode"] == mode


def exit_codes(folder) -> list[int]:
    """What the run in a folder told W&B that it ended with; its file has frames in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, codes, content = path.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _checksum, size, kind = struct.unpack("<IHB", data[position : position + 7])
        content += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last of several
            record = Record.FromString(content)
            codes += [record.exit.exit_code] if record.WhichOneof("record_type") == "exit" else []
            content = b""
    return codes


@pytest.mark.usefixtures("no_wandb_account")
def test_wandb_shows_a_run_that_raised_as_failed_and_others_as_finished(tmp_path):
    with WandbTracker(tmp_path / "sound", "rap", {}) as tracker:
        tracker.log(0, {"reward": 1})
    with pytest.raises(RuntimeError, match="run failed"), WandbTracker(tmp_path / "failed", "rap", {}):
        raise RuntimeError("run failed")
    assert (exit_codes(tmp_path / "sound"), exit_codes(tmp_path / "failed")) == ([0], [1])
