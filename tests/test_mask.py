"""Pruning masks are values: names in, names out, the same digest in every process."""

import copy
import dataclasses
import hashlib
import itertools
import json
import operator
import pickle
import subprocess
import sys
import timeit
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rap_env.components import KINDS, Component, Components, Site
from rap_env.errors import InvalidMask, UnknownName
from rap_env.llm.shape import ModelShape
from rap_env.llm.streams import parting
from rap_env.mask import PruningMask, full_order, kept_sites


def row(layer: int, kind: str, part: int | None = None) -> Component:
    site = Site(layer, kind)
    return Component(site.name if part is None else f"{site.name}.{part}", site, part, 100, 4)


def shape_of(n_layers: int) -> SimpleNamespace:
    """All that masks ask of a `ModelShape`."""
    return SimpleNamespace(components=tuple(row(layer, kind) for layer in range(n_layers) for kind in KINDS))


def parted_shape() -> SimpleNamespace:
    """Two layers whose attentions have two parts each and whose MLPs have three, but the last MLP is whole."""
    components = [row(0, "attention", part) for part in range(2)] + [row(0, "mlp", part) for part in range(3)]
    components += [row(1, "attention", part) for part in range(2)] + [row(1, "mlp")]
    return SimpleNamespace(components=tuple(components))


@pytest.fixture
def shape() -> SimpleNamespace:
    return shape_of(4)


@pytest.fixture
def dense(shape) -> PruningMask:
    return PruningMask.all_kept(shape)


def test_sites_are_named_by_layer_and_kind():
    assert Site(3, "attention").name == str(Site(3, "attention")) == "layer3.attention"
    assert str(row(3, "mlp", 1)) == "layer3.mlp.1"


def test_dropping_clears_exactly_the_named_bits_and_changes_no_other_mask(dense):
    mask = dense.drop("layer1.attention", row(2, "mlp"))
    assert mask.keep == (True, True, False, True, True, False, True, True)
    assert dense.keep == (True,) * 8
    assert [c.name for c in mask.dropped] == ["layer1.attention", "layer2.mlp"]
    assert [c.name for c in mask.kept] == [
        *("layer0.attention", "layer0.mlp", "layer1.mlp", "layer2.attention", "layer3.attention", "layer3.mlp")
    ]
    assert mask.keeps("layer1.mlp") and not mask.keeps("layer1.attention")
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


@pytest.mark.parametrize("method", ["drop", "restore", "keeps"])
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
        dense.drop(row(4, "mlp"))


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
        from rap_env.components import KINDS, Component, Components, Site
        from rap_env.mask import PruningMask
        sites = [Site(layer, kind) for layer in range(4) for kind in KINDS]
        components = tuple(Component(site.name, site, None, 7, 0) for site in sites)
        print(PruningMask(components, (False, *[True] * 6, False)).digest)
    """
    environment = {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == mask.digest


def test_a_sites_name_drops_and_restores_all_its_parts():
    dense = PruningMask.all_kept(parted_shape())
    mask = dense.drop("layer0.mlp", Site(1, "attention"))
    assert mask.keep == (True, True, False, False, False, False, False, True)
    assert [c.name for c in mask.dropped[:4]] == ["layer0.mlp.0", "layer0.mlp.1", "layer0.mlp.2", "layer1.attention.0"]
    assert mask.restore("layer0.mlp") == dense.drop("layer1.attention")
    assert mask == dense.drop(*(f"layer0.mlp.{part}" for part in range(3)), "layer1.attention.0", "layer1.attention.1")


def test_a_site_is_kept_while_any_of_its_parts_is():
    mask = PruningMask.all_kept(parted_shape()).drop("layer0.mlp.0", "layer0.mlp.2")
    assert mask.keeps("layer0.mlp") and mask.keeps("layer0.mlp.1") and not mask.keeps("layer0.mlp.2")
    assert not mask.drop("layer0.mlp.1").keeps("layer0.mlp")


def test_kept_parts_are_the_sites_in_model_order_with_the_bits_of_their_components():
    mask = PruningMask.from_bits(parted_shape(), [1, 0, 0, 1, 1, 0, 0, 1])
    assert mask.kept_parts == (
        (Site(0, "attention"), (True, False)),
        (Site(0, "mlp"), (False, True, True)),
        (Site(1, "attention"), (False, False)),
        (Site(1, "mlp"), (True,)),
    )
    kept = [Site(0, "attention", (0,)), Site(0, "mlp", (1, 2)), Site(1, "mlp")]
    assert kept_sites(mask) == kept and kept_sites(mask, 1, 3) == kept[1:2]
    assert [site.name for site in kept] == ["layer0.attention", "layer0.mlp", "layer1.mlp"]


def test_masks_part_at_the_first_site_of_which_they_keep_other_parts():
    dense = PruningMask.all_kept(parted_shape())
    first, second, last = dense.drop("layer0.attention.1"), dense.drop("layer0.mlp.2"), dense.drop("layer1.mlp")
    assert parting([dense, first], 0) == 0
    assert parting([dense, second], 0) == parting([dense, last, second], 0) == 1
    assert parting([second, dense.drop("layer0.mlp.1")], 0) == 1, "as many parts, but others"
    assert parting([dense, last], 0) == parting([dense, first, last], 1) == 3
    assert parting([dense, dense], 0) == parting([dense], 2) == parting([first, second], 4) == 4


def test_a_parts_name_survives_json():
    shape = parted_shape()
    mask = PruningMask.all_kept(shape).drop("layer0.attention.1", "layer1.mlp")
    assert json.loads(mask.to_json()) == {"n_components": 8, "dropped": ["layer0.attention.1", "layer1.mlp"]}
    assert PruningMask.from_json(shape, mask.to_json()) == mask
    assert mask.digest == hashlib.sha256(b"8:layer0.attention.1,layer1.mlp").hexdigest()


def test_masks_are_compared_and_hashed_in_less_than_20_microseconds_also_if_read_from_a_file(tiny_llm):
    components = tuple(row(layer, kind, part) for layer in range(32) for kind in KINDS for part in range(9))
    shape = dataclasses.replace(tiny_llm.shape, components=components)
    read = ModelShape.from_dict(json.loads(json.dumps(shape.to_dict())))
    mask, other = (PruningMask.all_kept(each).drop("layer31.mlp.8") for each in (shape, read))
    assert mask == other and hash(mask) == hash(other)
    assert mask != other.restore("layer31.mlp.8")
    for work in (lambda: mask == other, lambda: hash(mask)):
        seconds = min(timeit.repeat(work, number=100, repeat=20)) / 100  # the best, for others may use the machine
        assert seconds < 20e-6


@pytest.mark.parametrize("wrong", [["layer0.attention"] * 8, ["layer0.attention"], []])
def test_an_order_that_does_not_name_each_component_once_is_refused(wrong, tiny_llm):
    with pytest.raises(InvalidMask, match="expected an order over each of the 8 components once"):
        full_order(tiny_llm.shape.components, wrong)


def test_widths_keep_the_first_parts_of_every_site():
    shape = parted_shape()
    mask = PruningMask.from_widths(shape, [1, 3, 0, 1])
    assert [row.name for row in mask.dropped] == ["layer0.attention.1", "layer1.attention.0", "layer1.attention.1"]
    assert mask.widths == (1, 3, 0, 1)
    assert PruningMask.all_kept(shape).widths == (2, 3, 2, 1)
    assert PruningMask.from_widths(shape, np.zeros(4, dtype=int)).widths == (0, 0, 0, 0)


@pytest.mark.parametrize("passed_on", [lambda one: one, copy.copy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_mask_of_widths_has_bits_as_soon_as_somebody_asks(passed_on):
    shape = parted_shape()
    mask = passed_on(PruningMask.from_widths(shape, [1, 3, 0, 1]))
    same = PruningMask.from_bits(shape, [1, 0, 1, 1, 1, 0, 0, 1])
    assert mask.weight_bytes == same.weight_bytes and mask.kv_bytes_per_token == same.kv_bytes_per_token
    assert "keep" not in vars(mask) and not hasattr(mask, "kep")
    assert mask == same and hash(mask) == hash(same) and repr(mask) == repr(same) and mask.n_kept == same.n_kept


def test_widths_of_a_mask_that_keeps_other_parts_are_refused():
    mask = PruningMask.all_kept(parted_shape()).drop("layer0.mlp.1")
    with pytest.raises(InvalidMask, match=r"keeps the first parts of each site; layer0\.mlp keeps others"):
        _ = mask.widths


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([1, 3, 0], "expected 4 widths, one for each site; got 3"),
        ([1, 4, 0, 1], r"expected a width of 0 to 3 for layer0\.mlp; got 4"),
        ([-1, 3, 0, 1], r"expected a width of 0 to 2 for layer0\.attention; got -1"),
    ],
)
def test_widths_that_the_sites_do_not_have_are_refused(widths, message):
    with pytest.raises(InvalidMask, match=message):
        PruningMask.from_widths(parted_shape(), widths)


def test_components_that_were_built_twice_are_compared_without_their_rows(monkeypatch):
    # Whoever fills a cache that is keyed by shapes, look-ups by an equal one stay fast.
    first, second = (Components(parted_shape().components) for _time in range(2))
    assert first is not second and hash(first) == hash(second)
    assert operator.eq(first, second) and not operator.ne(first, second)
    compared = []
    monkeypatch.setattr(Component, "__eq__", lambda *pair: compared.append(pair) or False)
    assert operator.eq(first, second) and not operator.ne(first, second) and {first: 1}[second] and not compared


def test_components_differ_where_any_row_does():
    rows = parted_shape().components
    for changes in ({"weight_bytes": 7}, {"kv_bytes_per_token": 7}, {"part": 7}, {"site": Site(7, "mlp")}):
        others = Components((*rows[:-1], dataclasses.replace(rows[-1], **changes)))
        assert operator.ne(Components(rows), others) and not operator.eq(Components(rows), others)
    assert Components(rows) != Components(rows[:-1]) and Components(rows) == tuple(rows)
