"""The benchmark's parts run on a tiny model, say what they measured, and their arithmetic is right."""

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from experiments import benchmark
from experiments.benchmarks import PARTS, memory, part
from experiments.benchmarks.bench import Bench
from experiments.benchmarks.gsi import _agreement
from experiments.benchmarks.population import offspring, swapped
from experiments.benchmarks.scaling import exponent
from experiments.records import read_record, write_record
from experiments.report import benchmark_lines
from rap_env.mask import PruningMask

CONF = Path(__file__).parents[2] / "conf"
TINY = [
    "model=tiny",
    "calibration.tokens_per_sample=16",
    "evaluation.limit=2",
    "profile.decoded_tokens=2",
    "sites.levels=2",
    "sites.plain_every=5",
    "sites.repeats=1",
    "decoding.sequences=[1,2]",
    "decoding.new_tokens=4",
    "decoding.repeats=1",
    "gsi.seeds=[0,1]",
    "gsi.removals=2",
    "gsi.quality_removals=3",
    "gsi.plain_every=1",
    "scoring.plain_batch_sizes=[4]",
    "scoring.repeats=1",
    "population.masks=3",
    "population.repeats=1",
    "env.environments=2",
    "env.repeats=1",
    "scaling.tokens=[16,32]",
    "scaling.layers=[1,4]",
    "scaling.masks=[1,2]",
    "scaling.models=[]",
    "scaling.repeats=1",
    "quantised.formats=[[int8,full],[full,int8]]",
    "quantised.windows=2",
    "quantised.window_tokens=32",
    "quantised.decoded_tokens=3",
    "quantised.repeats=2",
    "live.shares=[0.5]",
    "live.windows=2",
    "live.read_tokens=24",
    "live.scored_tokens=8",
    "live.repeats=2",
    "peaks.masks=2",
    "peaks.workloads=[[1,40,2],[3,8,2]]",
    "peaks.read_tokens=16",
    "peaks.prompt_tokens=20",
    "peaks.decoded_batches=[2]",
    "peaks.decoded_tokens=2",
    "peaks.repeats=2",
    "table.steps=3",
    "table.repeats=1",
    "bits.formats=[full]",  # INT4 groups don't divide its sizes
    "bits.table.windows=2",
    "bits.table.window_tokens=32",
    "bits.report.windows=2",
    "bits.report.window_tokens=32",
    "bits.budgets=2",
    "workers.windows=[2,16]",
    "workers.masks=3",
    "workers.repeats=1",
    "workers.handed_out=8",
    "workers.stored=5",
]

FORMATS = [("full", "full"), ("int8", "full"), ("full", "int8")]


@pytest.fixture
def results_of(tmp_path, monkeypatch):
    """Runs a part on the tiny model and returns what its record holds."""
    monkeypatch.setenv("RAP_CACHE", str(tmp_path / "cache"))

    def run(name: str, *changes: str) -> dict:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("benchmark", overrides=[*TINY, *changes])
        reports = []
        bench = Bench(config)
        results = part(name).measure(bench, lambda done, total: reports.append((done, total)))
        assert reports and reports[-1][0] == reports[-1][1]
        assert all(isinstance(line, str) and line for line in part(name).lines(results))
        path = write_record(tmp_path / f"{name}.json", {"config": {}, "provenance": {}, "results": results})
        record = read_record(path)
        assert benchmark_lines(name, record) == [f"## {name}", *part(name).lines(results)]
        return record["results"]

    return run


def test_gsi_compares_three_rules_that_choose_alike(results_of):
    results = results_of("gsi")
    assert results["exact_against_plain"]["repeats"] == 2
    for run in results["runs"]:
        assert all(check["same_choice"] for check in run["plain_checks"])
        assert max(check["largest_difference"] for check in run["plain_checks"]) < 1e-4
        assert run["cost"]["exact"]["evaluations"] == 8 + 7 + 6
        assert len(run["lazy_loss_above_exact"]) == 3
    assert len(results["between_seeds"]["agreement_of_pairs"]) == 1


def test_single_sites_score_the_same_together(results_of):
    results = results_of("sites")
    assert results["identical"] and results["masks"] == 1 + 4 * (2 + 1)  # two heads, one group of channels
    assert results["largest_difference_from_plain"] < 1e-4


@pytest.mark.parametrize("name", ["sites", "gsi", "decoding", "scoring"])
def test_upstreams_model_may_be_of_another_type(results_of, name):
    results = results_of(name, "upstream_dtype=float16")
    assert results["plain_dtype"] == "torch.float16"
    assert any(" in float16" in line for line in part(name).lines(results))


def test_decoding_gives_the_tokens_of_generate(results_of):
    results = results_of("decoding")
    assert {n: of["equal_tokens"] for n, of in results["by_sequences"].items()} == {"1": 4, "2": 8}


def test_float32_is_upstreams(results_of):
    results = results_of("rounding")
    assert all(results[name]["largest"] == 0.0 for name in ("upstream", "ours", "ours in float32"))


def test_a_profile_tells_products_from_the_rest(results_of):
    results = results_of("profile")
    shares = results["shares"]["text"]
    assert {"matrix products", "head", "attention", "log-softmax"} <= set(shares["profiled_seconds"])
    windows, hidden, vocabulary = 4 * 16, 32, 257
    inner = 3 * hidden * 64 + 2 * hidden * hidden + 2 * hidden * 16  # of each of the layers
    assert shares["operations"]["matrix products"] >= 2 * windows * 4 * inner
    assert 2 * (windows - 4) * hidden * vocabulary == shares["operations"]["head"]


def test_scoring_agrees_with_lm_evals_own_adapter(results_of):
    results = results_of("scoring")
    assert results["float32"]["accuracies_equal"]
    assert results["float32"]["largest_difference"] < 1e-4
    assert results["tokens"] < results["tokens_of_requests"]


def test_a_population_scores_the_same_together(results_of):
    results = results_of("population")
    for name in ("one_swap", "one_to_three_swaps", "one_shift"):
        assert results[name]["identical"]
        assert min(results[name]["shared_executions_ratios"]) >= 1


def test_a_vector_environment_pays_what_single_ones_pay(results_of):
    results = results_of("env")
    assert results["random_bits"]["identical"] and results["projected_bits"]["identical"]
    assert 0 < results["stored"]["step_microseconds"] < 1e4


def test_scaling_fits_a_power_to_each_curve(results_of):
    results = results_of("scaling")
    assert [len(results[name]["seconds"]) for name in ("tokens", "layers", "masks", "models")] == [2, 2, 2, 0]
    assert results["models"]["exponent"] is None


def test_memory_is_measured_for_every_case(results_of, monkeypatch):
    monkeypatch.setattr(memory, "return_freed_memory", lambda: None)  # it would slow the rest of the tests down
    results = results_of("memory")
    importance = {"lazy importance", "exact importance"}
    assert {name for name in results["peak_bytes"] if "importance" in name} == importance
    assert len(results["peak_bytes"]) == 5 and all(isinstance(peak, int) for peak in results["peak_bytes"].values())
    # 4 layers of 9,216 weights, 2 x 257 x 32 of embedding and head, 9 norms of 32; 4 bytes each.
    assert results["weights_bytes"] == 4 * (4 * 9_216 + 2 * 257 * 32 + 9 * 32)


def test_switches_give_the_same_logits_and_each_way_to_a_past_has_its_loss(results_of):
    results = results_of("live")
    (switched,), (pasts,) = results["switches"].values(), results["pasts"].values()
    # Half of the attentions' two KV heads in 4 layers: 32 x (16 + 8 + 8 + 16) weights of 4 bytes each.
    assert switched["equal_logits"] and switched["dropped_bytes"] >= 4 * 4 * 32 * 48
    assert len(switched["released_bytes"]) == len(switched["up_seconds"]) == 2
    assert {*pasts} == {"stays pruned", "left out", "from now", "exact"} and len(
        {tuple(of["loss"]) for of in pasts.values()}
    ) == 4


def test_peaks_are_predicted_for_every_mask_and_workload_and_steps_are_timed(results_of):
    results = results_of("peaks")
    assert [each["workload"] for each in results["peaks"]] == 2 * [[1, 40, 2], [3, 8, 2]]
    # 4 layers with keys and values of 16 channels, 4 bytes each, where every head is kept.
    assert all(0 <= each["kv_cache_bytes"] <= 4 * 2 * 16 * 4 * 42 for each in results["peaks"])
    assert all(each["measured_bytes"] > 0 for each in results["peaks"])
    assert {name: len(own["dense"]) for name, own in results["latency"]["seconds"].items()} == {
        "prefill": 2,
        "decode 2": 2,
    }


def test_number_formats_are_measured_beside_the_loaded_one(results_of):
    results = results_of("quantised")
    full, weights, cache, *narrow = results["formats"]
    names = [f"{w} weights, {kv} KV cache" for w, kv in FORMATS]
    assert [found["format"] for found in results["formats"]] == [
        *names,
        *(f"{name}, 50% of all MLP channels" for name in names),
    ]
    mlps = [4 * 4 * 3 * 32 * 64, 4 * (3 * 32 * 64 + 4 * 2 * 64), 4 * 4 * 3 * 32 * 64]  # one part: half is none
    for whole, half, mlp in zip((full, weights, cache), narrow, mlps, strict=True):
        assert half["weight_bytes"] == whole["weight_bytes"] - mlp and "loss" not in half
        assert half["decoding"]["repeats"] == half["prefill"]["repeats"] == 2
    # 4 layers of 9,216 weights, 2 x 257 x 32 of embedding and head, 9 norms of 32; scales for 4 (2 x 32 + 2 x 16
    # + 2 x 64 + 32) outputs and 2 x 257 rows; 4 bytes each.
    assert full["weight_bytes"] == 4 * (4 * 9_216 + 2 * 257 * 32 + 9 * 32)
    assert weights["weight_bytes"] == 4 * 9_216 + 2 * 257 * 32 + 4 * (9 * 32 + 4 * 256 + 2 * 257)
    assert [cache["kv_bytes_per_token"], full["kv_bytes_per_token"]] == [4 * 2 * 2 * (8 + 4), 4 * 2 * 2 * 8 * 4]
    assert full["decoding"]["ratios"] == full["prefill"]["ratios"] == [1.0, 1.0]
    for found in (weights, cache):
        assert found["decoding"]["repeats"] == found["prefill"]["repeats"] == 2
        assert 0 < abs(found["loss"] - full["loss"]) < 0.1


def test_formats_of_sites_are_chosen_for_budgets_between_the_extremes(results_of):
    results = results_of("bits")
    assert [row["weights"] for row in results["table"]["rows"]] == ["int8", "full"] * 8
    largest, smallest = (results["extremes"][name] for name in ("largest", "smallest"))
    sizes = [smallest["weight_bytes"], *(found["budget_bytes"] for found in results["budgets"][::-1])]
    assert sizes == sorted(sizes) and sizes[-1] < largest["weight_bytes"]
    for found in results["budgets"]:
        ways = [found[name] for name in ("table", "front", "random")]
        assert all(smallest["weight_bytes"] <= way["weight_bytes"] <= found["budget_bytes"] for way in ways)
        assert all(0 < way["sites"] < 8 and abs(way["loss"] - largest["loss"]) < 0.1 for way in ways)


def test_a_power_law_gives_its_exponent():
    assert exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert exponent([5], [1.0]) is None


def test_agreement_of_an_order_with_its_reverse_is_minus_one():
    order = list("abcdef")
    assert _agreement(order, order, [2]) == {"kendall_tau": pytest.approx(1.0), "top_2_overlap": 1.0}
    assert _agreement(order, order[::-1], [2]) == {"kendall_tau": pytest.approx(-1.0), "top_2_overlap": 0.0}


def test_mutants_keep_as_many_of_each_kind(tiny_llm):
    parent = PruningMask.all_kept(tiny_llm.shape).drop("layer1.attention", "layer2.mlp", "layer3.mlp")
    masks = offspring(parent, 6, 3, np.random.default_rng(0))
    assert len(set(masks)) == 6 and parent not in masks
    for mask in masks:
        assert sorted(c.site.kind for c in mask.dropped) == ["attention", "mlp", "mlp"]
    again = offspring(parent, 6, 3, np.random.default_rng(0))
    assert masks == again
    assert len(set(swapped(parent, 1, np.random.default_rng(1)).dropped) & set(parent.dropped)) == 2


def test_every_comment_of_the_config_composes():
    commands = [line for line in (CONF / "benchmark.yaml").read_text().splitlines() if line.startswith("# python -m")]
    assert len(commands) == 7
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for command in commands:
            overrides = [word for word in command.split("  ")[0].split() if "=" in word]
            assert set(compose("benchmark", overrides=overrides).parts) <= set(PARTS)


def test_a_folder_that_holds_a_parts_record_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "env.json").write_text("kept")
    arguments = [*TINY, "parts=[population,env]", f"hydra.run.dir={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit, match=r"env.json exists, and records are written once; leave the part out"):
        benchmark.main()
    assert [path.name for path in tmp_path.iterdir()] == ["env.json"]


def test_steps_on_a_table_are_counted(results_of):
    results = results_of("table")
    assert len(results["seconds"]) == 1 and results["steps_per_second"] == 3 / results["seconds"][0]
    assert 0 <= results["measured_masks"] <= 3
