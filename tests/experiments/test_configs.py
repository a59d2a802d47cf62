"""Every YAML is bound to the code it configures, every option composes, and a misspelling is an error."""

import importlib
import inspect
import itertools
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf

from rap_env.mask import PruningMask
from rap_env.memory.workload import Workload
from rap_env.problem import PruningProblem

PROJECT = Path(__file__).parents[2]
CONF = PROJECT / "conf"
YAMLS = sorted(CONF.rglob("*.yaml"))
GROUPS = {
    folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in CONF.iterdir() if folder.is_dir()
}
GROUPS = {group: options for group, options in sorted(GROUPS.items()) if options}
OPTIONS = [f"{group}={option}" for group, options in GROUPS.items() for option in options]
EXPERIMENTS = sorted((CONF / "experiment").glob("*.yaml"))
OURS = ("rap_env.", "agents.", "experiments.")


def name_of(path: Path) -> str:
    return str(path.relative_to(CONF))


# what starts a command in a comment; both compose conf/config.yaml
COMMANDS = ("python train.py", "python -m experiments.compare")


@pytest.fixture
def composed():
    """Composes the config as train.py does."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides, **options: compose("config", overrides=list(overrides), **options)


def nodes_with_target(node):
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from nodes_with_target(value)
    elif isinstance(node, list):
        for value in node:
            yield from nodes_with_target(value)


def commands_of(path: Path) -> list[list[str]]:
    """Arguments of each command in the comment that a YAML starts with."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines())
    lines = [line.removeprefix("# ") for line in comment]
    return [
        shlex.split(line.removeprefix(start), comments=True)
        for line in lines
        for start in COMMANDS
        if line.startswith(start)
    ]


def jobs(arguments: list[str]) -> list[tuple[str, ...]]:
    """The overrides of each job: one for each combination of the values between commas."""
    swept = []
    for argument in arguments:
        if argument != "-m":
            key, _, values = argument.partition("=")
            swept.append([argument] if values.startswith("[") else [f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*swept))


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_every_target_is_ours_and_takes_the_keys_that_stand_beside_it(path):
    plain = OmegaConf.to_container(OmegaConf.load(path))
    for node in nodes_with_target(plain):
        target = node["_target_"]
        assert target.startswith(OURS), f"{name_of(path)}: {target} is not ours"
        module, _, attribute = target.rpartition(".")
        arguments = {key: value for key, value in node.items() if not key.startswith("_") and key != "defaults"}
        inspect.signature(getattr(importlib.import_module(module), attribute)).bind_partial(**arguments)


@pytest.mark.parametrize("name", GROUPS["agent"])
def test_hyperparameters_are_arguments_of_the_algorithm(name):
    config = OmegaConf.load(CONF / "agent" / f"{name}.yaml")
    if "algorithm" in config:
        module = importlib.import_module((config.get("_target_") or "agents.sb3.").rpartition(".")[0])
        algorithm, _more = module._ALGORITHMS[config.algorithm]
        inspect.signature(algorithm).bind_partial(**config.get("hyperparameters", {}))


@pytest.mark.parametrize("name", GROUPS["reward"])
def test_reward_weights_name_terms(name, toy_problem):
    weights = OmegaConf.to_container(OmegaConf.load(CONF / "reward" / f"{name}.yaml"))
    problem = PruningProblem(toy_problem.llm, toy_problem.evaluator, reward_weights=weights)
    outcome = problem.evaluate(PruningMask.all_kept(problem.shape), Workload(1, 128), 10**9)
    assert weights and set(weights) <= set(outcome.reward_terms)


@pytest.mark.parametrize("override", OPTIONS)
def test_every_option_of_every_group_composes(override, composed):
    group, _, _option = override.partition("=")
    config = composed(override)
    assert isinstance(config, DictConfig)
    assert group == "experiment" or config[group] is not None
    OmegaConf.to_container(config, resolve=True)  # interpolations too


def test_scenarios_of_a_workload_agree_in_their_generated_tokens(composed):
    for workload in GROUPS["workload"]:
        config = composed(f"workload={workload}", "workload.generated_tokens=64")
        assert config.workload.sampler.generated_tokens == 64
        if "budget_ratios" in config.workload.search:
            config = composed(f"workload={workload}", "workload.search.budget_ratios=[0.7]")
            assert config.workload.report.budget_ratios == [0.7], "reported on what is searched"


def test_a_family_holds_out_contexts_of_the_sequence_that_it_searches_on(composed):
    workload = composed("workload=family", "workload.search.n=5", "workload.search.seed=3").workload
    assert (workload.report.first, workload.report.seed) == (5, 3)
    assert workload.search.sampler == workload.report.sampler == workload.sampler


@pytest.mark.parametrize("path", YAMLS, ids=name_of)
def test_no_yaml_is_unused(path):
    defaults = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml").defaults)
    groups = {key.removeprefix("optional ") for entry in defaults if isinstance(entry, dict) for key in entry}
    mains = [CONF / f"{name}.yaml" for name in ("config", "benchmark", "serve", "rerank")]
    of_hydra = [CONF / "hydra" / name for name in ("launcher", "sweeper")]  # as those that its plugins bring
    assert path in mains or path.parent in of_hydra or (path.parent.parent == CONF and path.parent.name in groups)


def test_every_default_is_an_option():
    for entry in OmegaConf.load(CONF / "config.yaml").defaults:
        if not isinstance(entry, str) and not (group := next(iter(entry))).startswith("override hydra/"):
            option = entry[group]
            assert option is None or option in GROUPS[group.removeprefix("optional ")]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_command_in_an_experiments_first_comment_composes(path, composed):
    commands = commands_of(path)
    assert commands, f"{name_of(path)} does not say how it is run"
    for arguments in commands:
        assert f"experiment={path.stem}" in arguments or (path.stem == "family_quick" and not arguments)
        for overrides in jobs(arguments):
            composed(*overrides)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_an_experiment_compares_agents_that_there_are_in_a_folder_of_its_name(path, composed):
    config = composed(f"experiment={path.stem}", return_hydra_config=True)
    assert config.name.startswith(path.stem)
    if path.stem == "smoke":
        assert config.hydra.sweeper.params is None
        return
    swept = OmegaConf.to_container(config.hydra.sweeper.params)
    agents = swept["agent"].split(",")
    assert len(set(agents)) == len(agents) and set(agents) <= set(GROUPS["agent"])
    seeds = [int(seed) for seed in str(config.hydra.sweeper.params.seed).split(",")]
    assert seeds == list(range(len(seeds)))
    sweep = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    assert sweep["dir"] == "outputs/compare/${name}"
    others = swept.keys() - {"agent", "seed"}
    assert all(f"${{{key}}}" in sweep["subdir"] for key in others)
    assert others or sweep["subdir"] == "${hydra:runtime.choices.agent}-${seed}"


def test_commands_in_the_main_configs_comment_compose(composed):
    commands = commands_of(CONF / "config.yaml")
    assert len(commands) > 3
    for arguments in commands:
        for overrides in jobs([argument for argument in arguments if argument != "--help"]):
            composed(*overrides)


@pytest.mark.slow
@pytest.mark.parametrize("model", GROUPS["model"])
def test_every_agent_composes_with_every_model(model, composed):
    for agent in GROUPS["agent"]:
        config = composed(f"agent={agent}", f"model={model}")
        assert config.agent._target_.startswith("agents.")
        assert config.model == OmegaConf.load(CONF / "model" / f"{model}.yaml")


def test_unknown_option_is_an_error_that_lists_the_known_ones(composed):
    with pytest.raises(MissingConfigException, match=r"(?s)agent/pppo.*maskable_ppo"):
        composed("agent=pppo")


@pytest.mark.parametrize("misspelt", ["agent.total_stepz=1", "sead=1", "evaluation.limits=1", "modle=tiny"])
def test_misspelt_key_is_an_error(misspelt, composed):
    with pytest.raises(ConfigCompositionException, match=misspelt.partition("=")[0].rpartition(".")[2]):
        composed(misspelt)


def test_command_line_prints_the_config_of_a_run_on_llama(tmp_path):
    command = [sys.executable, str(PROJECT / "train.py"), "--cfg", "job", "agent=ppo", "model=llama2-7b"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    config = OmegaConf.create(done.stdout)
    assert (config.agent.algorithm, config.model.name) == ("ppo", "meta-llama/Llama-2-7b-hf")
