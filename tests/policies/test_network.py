import numpy as np
import pytest
import torch

from rap_env.errors import UnknownName
from rap_env.observation import observation_space
from rap_env.policies import OneStepPolicy, load_policy, save_policy
from rap_env.policies.network import ENTRIES, ComponentNetwork
from tests.policies.cases import ORDER, random_network


@pytest.fixture
def shape(tiny_llm):
    return tiny_llm.shape


def blinded(shape, *names: str) -> ComponentNetwork:
    network = ComponentNetwork(shape, sequential=False, width=16, blind_to=names)
    network.load_state_dict(random_network(shape, False).state_dict())
    return network


@pytest.mark.parametrize("name", ENTRIES)
def test_what_the_network_is_blind_to_does_not_move_it(shape, name):
    space = observation_space(shape)
    space.seed(0)
    first, other = space.sample(), space.sample()
    pair = {key: torch.from_numpy(np.stack([first[key], (other if key == name else first)[key]])) for key in first}
    for network, moves in ((blinded(shape), True), (blinded(shape, name), False)):
        one, two = network(pair)
        assert torch.allclose(one, two, atol=1e-5) != moves


def test_entries_are_those_of_the_observation(shape):
    assert set(ENTRIES) == set(observation_space(shape))


def test_a_saved_policy_stays_blind(shape, tmp_path):
    policy = OneStepPolicy(shape, blinded(shape, "gsi_ranking", "kept"), ORDER)
    assert load_policy(save_policy(policy, tmp_path)).parameters()["blind_to"] == ["gsi_ranking", "kept"]


def test_an_unknown_entry_is_refused(shape):
    with pytest.raises(UnknownName, match="unknown observation entry 'gsi_rank'; did you mean gsi_ranking"):
        ComponentNetwork(shape, sequential=False, blind_to=["gsi_rank"])
