"""Coarse widths: few of them, next to what the policy wants, and never over the budget."""

import numpy as np
import pytest

from rap_env.components import MLP
from rap_env.errors import InfeasibleBudget
from rap_env.llm import parts
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.memory.footprint import footprint
from rap_env.memory.workload import Workload
from rap_env.policies import OrderPolicy
from rap_env.serving.coarse import CoarseWidths
from tests.llm.test_parts import SIZES

WORK = Workload(4, 16)


@pytest.fixture(scope="module")
def shape():
    """MLPs of 11 parts, attentions of 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "GROUP_CHANNELS", 6)
        whole = build_random_llm("llama", SIZES | {"num_key_value_heads": 4})
        return SwitchableLLM(whole.model, whole.tokenizer, "coarse", "group").shape


class Fixed:
    def __init__(self, mask: PruningMask) -> None:
        self.mask = mask

    def decide(self, workload, budget_bytes) -> PruningMask:
        return self.mask


def needed(shape, mask: PruningMask) -> int:
    return footprint(shape, mask, WORK).peak_bytes


def test_widths_of_many_parts_are_few_and_fit_whatever_is_wanted(shape):
    generator, seen = np.random.default_rng(0), set()
    sites = [(site, own.stop - own.start) for site, own in shape.components.sites]
    for _ in range(300):
        wanted = PruningMask.from_widths(shape, [int(generator.integers(0, n + 1)) for _site, n in sites])
        mask = CoarseWidths(Fixed(wanted), shape, step=4).decide(WORK, needed(shape, wanted))
        assert needed(shape, mask) <= needed(shape, wanted)
        for (site, _n), width, before in zip(sites, mask.widths, wanted.widths, strict=True):
            assert abs(width - before) <= 4 and (site.kind == MLP or width == before)
            seen |= {width} if site.kind == MLP else set()
    assert seen == {0, 3, 7, 11}


def test_what_it_gives_up_is_little(shape):
    """Widths go up as well as down, so that the bytes are used."""
    order = [component.name for component in reversed(shape.components)]
    policy = OrderPolicy(shape, order)
    dense = needed(shape, PruningMask.all_kept(shape))
    for share in (0.95, 0.8, 0.65):
        mask = CoarseWidths(policy, shape, step=2).decide(WORK, int(share * dense))
        assert 0.93 * share * dense <= needed(shape, mask) <= share * dense


def test_its_levels_have_every_width_and_no_site_is_empty(shape):
    levels = CoarseWidths(Fixed(PruningMask.all_kept(shape)), shape, step=4).levels()
    widths = [set(column) for column in zip(*(level.widths for level in levels), strict=True)]
    assert widths == [{1, 2, 3, 4} if site.kind != MLP else {3, 7, 11} for site in shape.sites]


def test_where_nothing_fits_it_says_so(shape):
    with pytest.raises(InfeasibleBudget):
        CoarseWidths(Fixed(PruningMask.all_kept(shape)), shape).decide(WORK, shape.fixed_bytes - 1)
