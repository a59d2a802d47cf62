"""Curves of single sites: which widths are measured, what lies between, and what the token budget pays for."""

import pytest

from rap_env.errors import SearchExhausted
from rap_env.evaluation.meter import Meter, TokenBudget
from rap_env.importance.site_curves import measure_site_curves
from rap_env.llm import parts
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.switchable import SwitchableLLM
from tests.conftest import CountingEvaluator


class Squared(CountingEvaluator):
    """Each site costs the square of the part of it that is gone."""

    def evaluation_of(self, mask):
        gone = (1 - sum(bits) / len(bits) for _site, bits in mask.kept_parts)
        return super().evaluation_of(mask).__class__(1.0 - sum(part**2 for part in gone), {}, 1, 0.0)


@pytest.fixture
def grouped(monkeypatch) -> SwitchableLLM:
    """The tiny model: 4 attentions of 2 parts, 4 MLPs of 4."""
    monkeypatch.setattr(parts, "GROUP_CHANNELS", 16)
    tiny = build_tiny_llm()
    return SwitchableLLM(tiny.model, tiny.tokenizer, tiny.name, "group")


def meter_of(llm, tokens: int | None = None) -> Meter:
    return Meter(llm, Squared(), budget=TokenBudget(tokens))


def test_sites_are_measured_alone_at_each_width_up_to_the_levels(grouped):
    meter = meter_of(grouped)
    curves = measure_site_curves(meter, levels=4)
    assert len(curves.known) == meter.budget.spent == 1 + 4 * 2 + 4 * 4
    attention, mlp, *_others = curves.increases
    assert attention == pytest.approx((1.0, 0.25, 0.0)) and mlp == pytest.approx((1.0, 9 / 16, 1 / 4, 1 / 16, 0.0))


def test_between_measured_widths_a_curve_is_straight(grouped):
    curves = measure_site_curves(meter_of(grouped), levels=2)
    assert curves.increases[1] == pytest.approx((1.0, 5 / 8, 1 / 4, 1 / 8, 0.0))
    names = [component.name for component in grouped.shape.components]
    assert list(curves.costs) == names
    mlp = [name for name in names if name.startswith("layer0.mlp")]
    assert [curves.costs[name] for name in mlp] == pytest.approx([3 / 8, 3 / 8, 1 / 8, 1 / 8])


@pytest.mark.parametrize(
    ("tokens", "reserve", "levels"),
    [(25, 0, 4), (24, 0, 3), (27, 2, 4), (26, 2, 3), (17, 8, 2), (16, 8, 1), (9, 0, 1), (9, 8, 1)],
)
def test_there_are_as_many_levels_as_the_budget_pays_for(tokens, reserve, levels, grouped):
    meter = meter_of(grouped, tokens)
    curves = measure_site_curves(meter, 4, reserve)
    assert curves.levels == levels and meter.budget.spent <= tokens


def test_a_budget_below_one_level_and_no_level_are_refused(grouped, tiny_llm):
    with pytest.raises(SearchExhausted, match="9 more were asked for"):
        measure_site_curves(meter_of(grouped, 8), 4)
    with pytest.raises(ValueError, match="expected at least one level; got 0"):
        measure_site_curves(meter_of(tiny_llm), 0)


def test_whole_sites_have_one_point(tiny_llm):
    curves = measure_site_curves(meter_of(tiny_llm), 4)
    assert len(curves.known) == 9 and curves.increases == ((1.0, 0.0),) * 8
