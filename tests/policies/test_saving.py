"""A saved policy is replaced whole or not at all, and read without running code; what does not fit is refused."""

import functools
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rap_env.errors import InvalidMask, PolicyUnreadable, UnknownName
from rap_env.llm.loading import build_tiny_llm
from rap_env.memory.footprint import dense_bytes, footprint
from rap_env.memory.workload import Workload
from rap_env.policies import OneStepPolicy, OrderPolicy
from rap_env.policies.base import load_policy, save_policy
from tests.policies.cases import MAKERS, ORDER, random_network

WORKLOAD = Workload(2, 96)


@pytest.fixture(scope="module")
def shape(tiny_llm):
    return tiny_llm.shape


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
