"""An importance source gives the static order, or measures the present mask's."""

import copy

import pytest

from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.importance.gsi import CALIBRATION, greedy_sequential_importance
from rap_env.importance.source import ImportanceSource
from rap_env.mask import PruningMask
from tests.importance.cases import WINDOWS, loss_of


def meter_of(llm, store=None) -> Meter:
    return Meter(llm, PerplexityEvaluator(WINDOWS, CALIBRATION), store)


def test_the_current_order_is_dropped_components_first_then_by_the_loss_without_each(llm, ranking):
    source = ImportanceSource(ranking.order, meter_of(llm))
    dropped = [ranking.order[4], ranking.order[1]]
    mask = PruningMask.all_kept(llm.shape).drop(*dropped)
    losses = {c.name: loss_of(llm, [*dropped, c.name]) for c in mask.kept}
    assert source.current(mask) == (ranking.order[1], ranking.order[4], *sorted(losses, key=losses.get))
    assert source.static == ranking.order


def test_current_orders_read_what_an_exact_ranking_has_stored(llm, ranking, store, measured):
    greedy_sequential_importance(llm, WINDOWS, removals=1, exact=True, store=store)
    measured.clear()
    order = ImportanceSource(ranking.order, meter_of(llm, store)).current(PruningMask.all_kept(llm.shape))
    assert measured == []
    assert order == tuple(sorted(ranking.increases, key=ranking.increases.get))


def test_measuring_without_a_meter_is_refused(llm, ranking):
    with pytest.raises(ValueError, match="give the ImportanceSource a Meter"):
        ImportanceSource(ranking.order).current(PruningMask.all_kept(llm.shape))


def test_copies_of_a_source_are_the_source_itself(llm, ranking):
    source = ImportanceSource(ranking.order, meter_of(llm))
    assert copy.deepcopy({"importance": source})["importance"] is source
