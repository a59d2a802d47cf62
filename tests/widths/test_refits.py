"""Refits on disk: what they stand in for, and what is refused."""

import types

import pytest
import torch

from rap_env.errors import CompensationFailed
from rap_env.mask import PruningMask, kept_sites
from rap_env.widths import prepare
from rap_env.widths.prepare import WidthRecipe, prepare_widths
from rap_env.widths.statistics import input_statistics
from tests.widths.test_prepare import WINDOWS, build, small_groups  # noqa: F401


@pytest.mark.parametrize("member", ["opt", "llama, biases"])
def test_a_bias_stands_in_for_the_layers_own_and_keeps_the_mean_output(member):
    llm, dense = build(member), build(member)
    prepare_widths(llm, WINDOWS, WidthRecipe(compensation="bias"))
    means = {site: statistics.mean for site, statistics in input_statistics(dense, WINDOWS)}
    ordered = {site: statistics.mean for site, statistics in input_statistics(llm, WINDOWS)}
    mask = PruningMask.from_widths(llm.shape, [1] * len(llm.shape.sites))
    for whole, kept in zip(llm.shape.sites, kept_sites(mask), strict=True):
        output, (weight, bias) = dense.layer_of(whole).output(whole.kind), llm.refits.of(kept)
        mean = weight @ ordered[whole][: weight.shape[1]] + bias
        assert torch.allclose(mean, output.weight @ means[whole] + output.bias, atol=1e-4)


def test_refits_that_the_disk_does_not_hold_are_refused_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _folder: types.SimpleNamespace(free=1000))
    prepare_widths(build(), WINDOWS)  # orders alone are small
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CompensationFailed, match=r"take [\d,]+ bytes; .* has 1,000 left"):
        prepare_widths(build(), WINDOWS, WidthRecipe(compensation="bias"))
    assert sorted(tmp_path.rglob("*")) == before
