"""An importance source gives the static order, or measures the present mask's."""

import pytest

from rap_env.importance.source import ImportanceSource
from rap_env.importance.trials import RemovalMeter
from rap_env.mask import PruningMask
from tests.importance.cases import WINDOWS, loss_of


def test_the_current_order_is_dropped_components_first_then_by_their_trials(llm, ranking):
    source = ImportanceSource(ranking.order, RemovalMeter(llm, WINDOWS))
    dropped = [ranking.order[4], ranking.order[1]]
    mask = PruningMask.all_kept(llm.shape).drop(*dropped)
    losses = {c.name: loss_of(llm, [*dropped, c.name]) for c in mask.kept}
    expected = (ranking.order[1], ranking.order[4], *sorted(losses, key=losses.get))
    assert source.current(mask) == expected
    assert source.static == ranking.order
    assert source.loss_after(mask, expected[2]) == pytest.approx(losses[expected[2]], abs=1e-5)
    assert source.loss(mask) == pytest.approx(loss_of(llm, dropped), abs=1e-5)


def test_current_orders_read_what_an_exact_ranking_has_stored(llm, ranking, store, measured):
    mask = PruningMask.all_kept(llm.shape)
    first = ImportanceSource(ranking.order, RemovalMeter(llm, WINDOWS, store))
    order = first.current(mask)
    assert len(measured) == 8
    measured.clear()
    again = ImportanceSource(ranking.order, RemovalMeter(llm, WINDOWS, store))
    assert again.current(mask) == order
    assert [again.loss_after(mask, name) for name in order] == [first.loss_after(mask, name) for name in order]
    assert again.loss(mask.drop(order[0])) == again.loss_after(mask, order[0])
    assert measured == []


def test_measuring_without_a_meter_is_refused(llm, ranking):
    source, dense = ImportanceSource(ranking.order), PruningMask.all_kept(llm.shape)
    for measure in (source.current, source.loss, lambda mask: source.loss_after(mask, "layer0.mlp")):
        with pytest.raises(ValueError, match="give the ImportanceSource a RemovalMeter"):
            measure(dense)
