"""Pruning masks are values: names in, names out, the same digest in every process."""

import dataclasses
import hashlib
import itertools
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rap_env.errors import InvalidMask, UnknownName
from rap_env.mask import KINDS, Component, PruningMask, by_layer, full_order


def shape_of(n_layers: int) -> SimpleNamespace:
    """All that masks ask of a `ModelShape`."""
    return SimpleNamespace(components=tuple(Component(layer, kind) for layer in range(n_layers) for kind in KINDS))


@pytest.fixture
def shape() -> SimpleNamespace:
    return shape_of(4)


@pytest.fixture
def dense(shape) -> PruningMask:
    return PruningMask.all_kept(shape)


def test_components_are_named_by_layer_kind_and_group():
    assert Component(3, "attention").name == "layer3.attention"
    assert str(Component(3, "mlp", 1)) == "layer3.mlp.1"


def test_dropping_clears_exactly_the_named_bits_and_changes_no_other_mask(dense):
    mask = dense.drop("layer1.attention", Component(2, "mlp"))
    assert mask.keep == (True, True, False, True, True, False, True, True)
    assert dense.keep == (True,) * 8
    assert [c.name for c in mask.dropped] == ["layer1.attention", "layer2.mlp"]
    assert [c.name for c in mask.kept] == [
        *("layer0.attention", "layer0.mlp", "layer1.mlp", "layer2.attention", "layer3.attention", "layer3.mlp")
    ]
    assert mask.keeps("layer1.mlp") and not mask.keeps("layer1.attention")
    assert mask.position("layer2.mlp") == 5
    assert str(mask) == "6 of 8 components kept"


def test_dropping_twice_or_nothing_is_the_same_mask(dense):
    once = dense.drop("layer0.mlp")
    assert once.drop("layer0.mlp") == once and hash(once.drop("layer0.mlp")) == hash(once)
    assert dense.drop() == dense


def test_restoring_undoes_dropping(dense):
    mask = dense.drop("layer0.mlp", "layer3.attention")
    assert mask.restore("layer0.mlp") == dense.drop("layer3.attention")
    assert mask.restore("layer0.mlp", "layer3.attention") == dense


def test_masks_cannot_be_changed(dense):
    with pytest.raises(dataclasses.FrozenInstanceError):
        dense.keep = (False,) * 8


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_bits_of_any_sequence_type_are_read_in_component_order(shape, dense, kind):
    mask = PruningMask.from_bits(shape, kind([1, 1, 0, 1, 1, 0, 1, 1]))
    assert mask == dense.drop("layer1.attention", "layer2.mlp")
    assert all(type(bit) is bool for bit in mask.keep)


def test_an_action_of_the_environment_is_a_mask(shape, dense):
    assert PruningMask.from_bits(shape, np.array([0, 1, 1, 1, 1, 1, 1, 1], dtype=np.int8)) == dense.drop(
        "layer0.attention"
    )


@pytest.mark.parametrize("length", [0, 7, 9])
def test_a_wrong_number_of_bits_is_refused(shape, length):
    with pytest.raises(InvalidMask, match=f"expected 8 keep-bits, one for each component; got {length}"):
        PruningMask.from_bits(shape, [1] * length)
    with pytest.raises(InvalidMask, match=f"expected 8 keep-bits, one for each component; got {length}"):
        PruningMask(shape.components, (True,) * length)


@pytest.mark.parametrize("bad", [2, -1, 0.5, "1", None, float("nan")])
def test_a_bit_that_is_neither_zero_nor_one_is_refused(shape, bad):
    with pytest.raises(InvalidMask, match="expected keep-bits of 0 or 1; got") as refusal:
        PruningMask.from_bits(shape, [1, bad, 1, 1, 1, 1, 1, 1])
    assert repr(bad) in str(refusal.value)


@pytest.mark.parametrize("method", ["drop", "restore", "keeps", "position"])
def test_an_unknown_component_is_refused_with_the_close_name(dense, method):
    with pytest.raises(UnknownName, match=r"unknown component 'layer3\.atention'; did you mean layer3\.attention"):
        getattr(dense, method)("layer3.atention")


def test_a_name_like_nothing_known_lists_what_is_known(shape):
    with pytest.raises(UnknownName, match=r"unknown component '\?\?\?'; known: layer0\.attention, layer0\.mlp, .*mlp$"):
        PruningMask.all_kept(shape).drop("???")
    with pytest.raises(UnknownName, match=r"\(and 8 more\)"):  # 20 components, of which 12 are listed
        PruningMask.all_kept(shape_of(10)).drop("???")


def test_a_component_of_a_deeper_model_is_unknown(dense):
    with pytest.raises(UnknownName, match=r"'layer4\.mlp'"):
        dense.drop(Component(4, "mlp"))


def test_json_gives_every_mask_of_a_small_model_back():
    shape = shape_of(2)
    for bits in itertools.product((False, True), repeat=4):
        mask = PruningMask(shape.components, bits)
        assert PruningMask.from_json(shape, mask.to_json()) == mask


def test_json_of_another_model_is_refused(shape, dense):
    with pytest.raises(InvalidMask, match="expected a mask over 8 components; got 6"):
        PruningMask.from_json(shape, PruningMask.all_kept(shape_of(3)).to_json())
    with pytest.raises(UnknownName, match=r"unknown component 'layer9\.mlp'"):
        PruningMask.from_json(shape, '{"n_components": 8, "dropped": ["layer9.mlp"]}')


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"n_components": 8}', '{"n_components": 8, "dropped": 3}'])
def test_text_that_is_no_mask_is_refused(shape, text):
    with pytest.raises(InvalidMask, match="expected the JSON of a pruning mask"):
        PruningMask.from_json(shape, text)


def test_the_digest_is_sha256_over_the_number_and_the_dropped_names(dense):
    mask = dense.drop("layer2.mlp", "layer1.attention")
    assert mask.digest == hashlib.sha256(b"8:layer1.attention,layer2.mlp").hexdigest()


def test_different_masks_have_different_digests():
    masks = [
        PruningMask(shape_of(layers).components, bits)
        for layers in (1, 2, 3)
        for bits in itertools.product((False, True), repeat=2 * layers)
    ]
    assert len(masks) == 4 + 16 + 64
    assert len({mask.digest for mask in masks}) == len(masks)


def test_the_digest_is_equal_in_another_process(dense):
    mask = dense.drop("layer0.attention", "layer3.mlp")
    program = """if True:
        from rap_env.mask import KINDS, Component, PruningMask
        components = tuple(Component(layer, kind) for layer in range(4) for kind in KINDS)
        print(PruningMask(components, (False, *[True] * 6, False)).digest)
    """
    environment = {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == mask.digest


@pytest.mark.parametrize("wrong", [["layer0.attention"] * 8, ["layer0.attention"], []])
def test_an_order_that_does_not_name_each_component_once_is_refused(wrong, tiny_llm):
    with pytest.raises(InvalidMask, match="expected an order over each of the 8 components once"):
        full_order(tiny_llm.shape.components, wrong)


def test_whole_layers_hold_their_components_in_model_order(tiny_llm):
    layers = by_layer(tiny_llm.shape.components)
    assert [[c.name for c in layer] for layer in layers] == [[f"layer{i}.attention", f"layer{i}.mlp"] for i in range(4)]
    assert by_layer(()) == []
