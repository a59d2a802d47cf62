"""Policies never exceed a feasible budget, decide the same after saving and loading, and load without running code."""

import functools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rap_env.errors import InfeasibleBudget, InvalidMask, PolicyUnreadable, UnknownName
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, footprint, smallest_bytes
from rap_env.memory.scenario import ScenarioSampler
from rap_env.memory.workload import Workload
from rap_env.policies import DensePolicy, OneStepPolicy, OrderPolicy, RandomPolicy, SequentialPolicy
from rap_env.policies.base import load_policy, save_policy
from rap_env.policies.network import ComponentNetwork
from rap_env.rng import isolated_rng
from tests.policies.cases import MAKERS, ORDER, random_network

WORKLOAD = Workload(2, 96)  # an attention frees 12,288 + 192 * 128 = 36,864 bytes here, an MLP 24,576


@pytest.fixture(scope="module")
def shape(tiny_llm):
    return tiny_llm.shape


def biased_network(shape, biases, stop: float | None = None) -> ComponentNetwork:
    """A network whose scores are the given constants, whatever it sees."""
    network = ComponentNetwork(shape, sequential=stop is not None, width=4)
    with torch.no_grad():
        network.particular.bias.copy_(torch.tensor(biases))
        if stop is not None:
            network.stop.weight.zero_()
            network.stop.bias.fill_(stop)
    return network


FITTING = [kind for kind in MAKERS if kind != "dense"]


@pytest.fixture
def policy(request, shape):
    return MAKERS[request.param](shape)


def scenarios(shape, n: int, seed: int = 0) -> list:
    sampler = ScenarioSampler((1, 16), (1, 2048), (0.32, 1.0), generated_tokens=3)
    generator = np.random.default_rng(seed)
    return [sampler.sample(shape, generator) for _ in range(n)]


def peak_bytes(shape, mask, workload=WORKLOAD) -> int:
    return footprint(shape, mask, workload).peak_bytes


@pytest.mark.parametrize("policy", FITTING, indirect=True)
def test_no_feasible_budget_is_ever_exceeded(policy, shape):
    masks = [policy.decide(s.workload, s.budget_bytes) for s in scenarios(shape, 300)]
    for scenario, mask in zip(scenarios(shape, 300), masks, strict=True):
        assert peak_bytes(shape, mask, scenario.workload) <= scenario.budget_bytes
    assert len(set(masks)) > 10  # so that dropping everything each time would not pass


@pytest.mark.parametrize("policy", ["random", "order", "nearest_order", "one_step_network"], indirect=True)
def test_nothing_stays_dropped_that_there_is_room_for(policy, shape):
    for scenario in scenarios(shape, 100):
        mask = policy.decide(scenario.workload, scenario.budget_bytes)
        for component in mask.dropped:
            assert peak_bytes(shape, mask.restore(component), scenario.workload) > scenario.budget_bytes


@pytest.mark.parametrize("policy", FITTING, indirect=True)
def test_the_smallest_budget_is_met_by_dropping_everything_and_a_smaller_one_refused(policy, shape):
    smallest = smallest_bytes(shape, WORKLOAD)
    assert not policy.decide(WORKLOAD, smallest).kept
    with pytest.raises(InfeasibleBudget, match=r"no pruning mask fits 66,943 bytes .* needs 66,944 bytes") as refusal:
        policy.decide(WORKLOAD, smallest - 1)
    assert refusal.value.smallest_bytes == smallest


@pytest.mark.parametrize("policy", [kind for kind in MAKERS if kind != "sequential_network"], indirect=True)
def test_with_room_for_everything_everything_is_kept(policy, shape):
    assert policy.decide(WORKLOAD, dense_bytes(shape, WORKLOAD)) == PruningMask.all_kept(shape)


def test_the_dense_policy_keeps_everything_whatever_the_budget(shape):
    assert not DensePolicy(shape).decide(WORKLOAD, 1).dropped


def test_only_the_shortest_prefix_of_an_order_that_fits_is_touched(shape):
    dense = PruningMask.all_kept(shape)
    for budget in range(smallest_bytes(shape, WORKLOAD), dense_bytes(shape, WORKLOAD), 4096):
        prefix = next(ORDER[:n] for n in range(9) if peak_bytes(shape, dense.drop(*ORDER[:n])) <= budget)
        dropped = {c.name for c in OrderPolicy(shape, ORDER).decide(WORKLOAD, budget).dropped}
        assert prefix[-1] in dropped and dropped <= set(prefix)


BY_HAND = [(0, ""), (1, "0"), (24576, "0"), (24577, "1"), (36864, "1"), (36865, "01"), (61441, "012"), (86017, "013")]


@pytest.mark.parametrize(("missing", "dropped"), BY_HAND)
def test_an_order_by_hand(shape, missing, dropped):
    # The order is MLP, attention, MLP, attention: 24,576, 36,864, 24,576, 36,864 bytes. At 24,577 two are dropped and
    # the first comes back; at 86,017 four are, and of the 36,863 bytes left over the third takes its share first.
    mask = OrderPolicy(shape, ORDER).decide(WORKLOAD, dense_bytes(shape, WORKLOAD) - missing)
    assert mask == PruningMask.all_kept(shape).drop(*(ORDER[int(index)] for index in dropped))


@pytest.mark.parametrize("order", [[], ORDER[:7], [*ORDER, ORDER[0]], [*ORDER[:7], ORDER[0]], [*ORDER[:7], "head"]])
def test_an_order_that_is_not_over_each_component_once_is_refused(shape, order):
    network = random_network(shape, False)
    for make in (lambda: OrderPolicy(shape, order), lambda: OneStepPolicy(shape, network, order)):
        with pytest.raises(InvalidMask, match="expected an order over each of the 8 components once"):
            make()


def test_a_random_policy_is_deterministic_and_its_seed_and_scenario_matter(shape):
    asked = scenarios(shape, 50)

    def decide_all(seed):
        policy = RandomPolicy(shape, seed)
        return [policy.decide(s.workload, s.budget_bytes) for s in asked]

    with isolated_rng(1):
        first = decide_all(1)
    with isolated_rng(2):
        assert decide_all(1) == first
    assert decide_all(2) != first
    budget = dense_bytes(shape, WORKLOAD) // 2
    assert len({RandomPolicy(shape).decide(WORKLOAD, budget - offset) for offset in range(30)}) > 5


@pytest.mark.parametrize("policy", FITTING, indirect=True)
def test_budgets_may_be_numpy_integers_or_floats(policy, shape):
    budget = dense_bytes(shape, WORKLOAD) // 2
    expected = policy.decide(WORKLOAD, budget)
    assert policy.decide(WORKLOAD, np.int64(budget)) == policy.decide(WORKLOAD, float(budget)) == expected


def test_a_one_step_network_keeps_what_it_scores_above_zero_if_that_fits(shape):
    wish = PruningMask.all_kept(shape).drop("layer0.mlp", "layer3.attention")
    policy = OneStepPolicy(shape, biased_network(shape, [0.1 if bit else -0.1 for bit in wish.keep]), ORDER)
    budget = peak_bytes(shape, wish)
    assert policy.decide(WORKLOAD, budget) == wish
    assert policy.decide(WORKLOAD, budget - 1) == wish.drop(ORDER[0])  # the least important one that is left
    assert policy.decide(WORKLOAD, budget + 24_576) == wish.restore("layer0.mlp")


def test_a_sequential_network_drops_by_score_until_it_stops_within_budget(shape):
    scores = [float(rank) for rank in (3, 7, 1, 5, 0, 6, 2, 4)]
    by_score = [shape.components[i].name for i in np.argsort(scores)[::-1]]
    eager = SequentialPolicy(shape, biased_network(shape, scores, stop=100.0), ORDER)
    dense = PruningMask.all_kept(shape)
    for n in range(9):
        mask = dense.drop(*by_score[:n])
        assert eager.decide(WORKLOAD, peak_bytes(shape, mask)) == mask
    # Once it fits, nothing more is dropped, however much the network would like to.
    never = SequentialPolicy(shape, biased_network(shape, scores, stop=-100.0), ORDER)
    assert never.decide(WORKLOAD, dense_bytes(shape, WORKLOAD)) == dense
    assert never.decide(WORKLOAD, peak_bytes(shape, dense.drop(by_score[0]))) == dense.drop(by_score[0])


@pytest.mark.parametrize("policy", MAKERS, indirect=True)
def test_a_policy_decides_the_same_after_saving_and_loading(policy, shape, tmp_path):
    folder = tmp_path / "deep" / "policy"
    assert save_policy(policy, folder) == folder
    loaded = load_policy(str(folder))
    assert type(loaded) is type(policy) and loaded.kind == policy.kind and loaded.shape == shape
    for scenario in scenarios(shape, 60, seed=1):
        arguments = scenario.workload, scenario.budget_bytes
        assert loaded.decide(*arguments) == policy.decide(*arguments)
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == {"policy.json"} | (
        {"policy"} if policy.tensors() else set()
    )


def tensors_of(folder: Path) -> Path:
    (path,) = folder.glob("policy-*.safetensors")
    return path


def test_saving_again_replaces_the_policy(shape, tmp_path):
    for kind in ("one_step_network", "order", "sequential_network", "random"):
        save_policy(MAKERS[kind](shape), tmp_path)
        assert load_policy(tmp_path).kind == kind
        assert len(list(tmp_path.iterdir())) == (2 if "network" in kind else 1), "nothing of the older one is left"


def test_a_reader_meets_the_old_policy_or_the_new_one_whenever_saving_is_cut_off(shape, tmp_path, monkeypatch):
    old, new = (OneStepPolicy(shape, random_network(shape, False, seed), ORDER) for seed in (0, 1))
    save_policy(old, tmp_path)
    replace = Path.replace

    def cut_off_after(n_files: int):
        calls = []

        def replace_some(path, target):
            if len(calls) == n_files:
                raise KeyboardInterrupt
            calls.append(target)
            return replace(path, target)

        return replace_some

    for n_files in (0, 1):
        monkeypatch.setattr(Path, "replace", cut_off_after(n_files))
        with pytest.raises(KeyboardInterrupt):
            save_policy(new, tmp_path)
        monkeypatch.undo()
        assert all(torch.equal(old.tensors()[n], t) for n, t in load_policy(tmp_path).tensors().items())
    save_policy(new, tmp_path)
    assert all(torch.equal(new.tensors()[n], t) for n, t in load_policy(tmp_path).tensors().items())


def test_a_policy_of_another_model_with_as_many_layers_is_refused_where_its_mask_is_served(shape, tiny_llm):
    other = build_tiny_llm(dtype="bfloat16")
    mask = OrderPolicy(other.shape, ORDER).decide(WORKLOAD, dense_bytes(other.shape, WORKLOAD))
    with pytest.raises(InvalidMask, match="8 components"):
        tiny_llm.apply(mask)
    with pytest.raises(InvalidMask, match="8 components"):
        footprint(shape, mask, WORKLOAD)


class Bomb(str):
    """Creates the file that it names when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path(self),)


@pytest.mark.parametrize("name", ["policy.pkl", "policy.pt", "policy.json", "policy.safetensors"])
def test_a_pickle_is_refused_and_never_run(shape, tmp_path, name):
    folder, fired = tmp_path / "policy", tmp_path / "fired"
    save_policy(MAKERS["one_step_network"](shape), folder)
    if not name.endswith(("json", "safetensors")):
        (folder / "policy.json").unlink()
    path = tensors_of(folder) if name == "policy.safetensors" else folder / name
    path.write_bytes(pickle.dumps(Bomb(fired)))
    with pytest.raises(PolicyUnreadable, match=r"expected policy\.json; found: .*policy\.p|not a policy of this"):
        load_policy(folder)
    assert not fired.exists()
    pickle.loads(path.read_bytes())
    assert fired.exists()  # so it would have


def test_a_folder_without_a_policy_says_what_it_holds(tmp_path):
    with pytest.raises(PolicyUnreadable, match=r"expected policy\.json; found: no such folder"):
        load_policy(tmp_path / "none")
    with pytest.raises(PolicyUnreadable, match="found: nothing"):
        load_policy(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(PolicyUnreadable, match=r"found: notes\.txt"):
        load_policy(tmp_path)


def edited(folder: Path, path: str, value) -> Path:
    """Changes one entry of a saved description."""
    description = json.loads((folder / "policy.json").read_text())
    *parents, last = path.split(".")
    functools.reduce(dict.get, parents, description)[last] = value
    (folder / "policy.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"format": 2}', "\udcff"])
def test_a_damaged_description_is_refused(shape, tmp_path, text):
    save_policy(OrderPolicy(shape, ORDER), tmp_path)
    (tmp_path / "policy.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PolicyUnreadable, match="not a policy of this version"):
        load_policy(tmp_path)


def test_another_format_and_another_kind_are_refused(shape, tmp_path):
    with pytest.raises(PolicyUnreadable, match="expected format 2; got 3"):
        load_policy(edited(save_policy(OrderPolicy(shape, ORDER), tmp_path), "format", 3))
    edited(tmp_path, "format", 2)
    with pytest.raises(UnknownName, match="unknown policy kind 'odrer'; did you mean order"):
        load_policy(edited(tmp_path, "kind", "odrer"))


UNFIT = [
    ("order", "parameters.order", [ORDER[:5], None]),
    ("order", "parameters", [{}, {"order": ORDER, "more": 1}]),
    ("order", "shape.components", [[], 3]),
    ("order", "shape", [{}]),
    ("random", "parameters.seed", ["five", -1]),
    ("milp", "parameters.costs", [{}, 3, ORDER, {name: float("nan") for name in ORDER}]),
    ("nearest_order", "parameters.orders", [{}, 3, ORDER, {"0": ORDER}, {"many": ORDER}, {"64": ORDER[:5]}]),
    ("one_step_network", "parameters.order", [ORDER[:5]]),
    ("one_step_network", "parameters.width", [17, "16"]),
    ("one_step_network", "parameters.blind_to", [["weather"], None, "footprint"]),
    ("one_step_network", "shape.components", [3]),
    ("one_step_network", "kind", ["sequential_network"]),
    ("sequential_network", "kind", ["one_step_network"]),
]


@pytest.mark.parametrize(("kind", "path", "values"), UNFIT)
def test_a_description_that_does_not_fit_is_refused_when_loading(shape, tmp_path, kind, path, values):
    for value in values:
        folder = edited(save_policy(MAKERS[kind](shape), tmp_path), path, value)
        with pytest.raises(PolicyUnreadable, match=f"{tmp_path}: not a policy of this version: "):
            load_policy(folder)


def test_tensors_that_do_not_fit_are_refused(shape, tmp_path):
    policy = MAKERS["sequential_network"](shape)
    folder = save_policy(policy, tmp_path)
    tensors = {name: tensor.clone() for name, tensor in policy.tensors().items()}
    fewer = {name: tensor for name, tensor in tensors.items() if name != "stop.bias"}
    for content in (fewer, tensors | {"score.weight": torch.zeros(1, 15)}, tensors | {"extra": torch.zeros(1)}):
        save_file(content, tensors_of(folder))
        with pytest.raises(PolicyUnreadable, match=r"(?s)of this version: .*(score\.weight|stop\.bias|extra)"):
            load_policy(folder)
    for whole in (b"", (tensors_of(folder)).read_bytes()[:-8]):
        (tensors_of(folder)).write_bytes(whole)
        with pytest.raises(PolicyUnreadable, match="not a policy of this version"):
            load_policy(folder)
    (tensors_of(folder)).unlink()
    with pytest.raises(PolicyUnreadable, match=r"(?s)not a policy of this version: .*No such file"):
        load_policy(folder)
