"""Workers: masks evaluated by Ray actors get exactly the results of one process, whoever dies meanwhile."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from rap_env.errors import InvalidConfig, ModelUnavailable, WorkersFailed
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.remote import RemoteEvaluator
from rap_env.evaluation.workers import Workers, batches
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from tests.evaluation import worker_cases as cases


@pytest.fixture(scope="module")
def ray():
    """A Ray of two CPUs, whatever this machine has."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def threads():
    """Workers have as many threads as this process; here one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workers(ray, threads) -> Workers:
    return Workers(build_tiny_llm, n_workers=2, batch_masks=3)


@pytest.fixture
def masks(tiny_llm) -> list[PruningMask]:
    """Thirty masks, the dense one and the deadly one among them."""
    dense = PruningMask.all_kept(tiny_llm.shape)
    bits = np.random.default_rng(0).random((40, len(dense.keep))) < 0.7
    random = [PruningMask(dense.components, tuple(row.tolist())) for row in bits]
    return list(dict.fromkeys([dense, dense.drop(cases.DEADLY), *random]))[:30]


def test_two_workers_and_one_killed_in_the_middle_equal_one_process_exactly(workers, ray, tiny_llm, masks, tmp_path):
    evaluator = cases.DeadlyEvaluator(tmp_path)
    expected = dict(evaluator.evaluate_many(tiny_llm, masks))
    (tmp_path / "measured").unlink()
    (tmp_path / "life0").touch()
    (tmp_path / "life1").touch()
    found = {}
    for mask, evaluation in RemoteEvaluator(evaluator, workers).evaluate_many(tiny_llm, masks):
        assert mask not in found
        found[mask] = evaluation
        if len(found) == 10:
            ray.kill(workers._slots[0].actor)
    assert {mask: found[mask].tasks for mask in masks} == {mask: expected[mask].tasks for mask in masks}
    assert not list(tmp_path.glob("life*"))  # two died of a mask, which is evaluated in the end
    assert len({line.split()[0] for line in (tmp_path / "measured").read_text().splitlines()}) >= 3


def test_stored_results_are_those_of_one_process_and_are_found_by_both(workers, tiny_llm, masks, store):
    inner = DivergenceEvaluator(cases.WINDOWS, "text")
    remote = Meter(tiny_llm, RemoteEvaluator(inner, workers), store)
    assert len(remote.ensure_known(masks)) == len(masks)
    local, alone = Meter(tiny_llm, inner, store), Meter(tiny_llm, inner)
    assert local.ensure_known(masks) == set() and local.budget.spent == remote.budget.spent
    assert alone.evaluate(masks) == local.evaluate(masks) == remote.evaluate(masks)


def test_masks_near_another_are_exact_as_well_and_a_part_of_the_text_is_a_remote_evaluator(workers, tiny_llm, masks):
    part = RemoteEvaluator(PerplexityEvaluator(cases.WINDOWS, "text"), workers).first(0.5)
    expected = dict(PerplexityEvaluator(cases.WINDOWS[:2], "text").evaluate_many(tiny_llm, masks))
    assert isinstance(part, RemoteEvaluator) and part.first(1.0) is part
    assert dict(part.evaluate_many(tiny_llm, masks, near=masks[0])) == expected


def test_a_mask_that_ends_every_worker_is_named_and_costs_no_other(workers, tiny_llm, masks, store, tmp_path):
    for life in range(9):
        (tmp_path / f"life{life}").touch()
    meter = Meter(tiny_llm, RemoteEvaluator(cases.DeadlyEvaluator(tmp_path), workers), store)
    with pytest.raises(WorkersFailed, match=rf"3 workers died while .* the mask that drops {cases.DEADLY}; what is"):
        meter.evaluate(masks)
    assert len(list(tmp_path.glob("life*"))) == 9 - 3
    known = len(store)
    assert known == meter.fresh_evaluations
    for life in tmp_path.glob("life*"):
        life.unlink()
    workers._deaths.clear()
    assert len(meter.ensure_known(masks)) == len(masks) - known  # the workers work again, and nothing is claimed


def test_what_an_evaluator_raises_in_a_worker_is_raised_here(workers, tiny_llm, masks):
    with pytest.raises(ModelUnavailable, match=r"^the weights are gone$"):
        list(RemoteEvaluator(cases.FailingEvaluator(), workers).evaluate_many(tiny_llm, masks[:3]))


def test_who_stops_early_leaves_no_answers_behind(workers, tiny_llm, masks):
    evaluator = RemoteEvaluator(PerplexityEvaluator(cases.WINDOWS, "text"), workers)
    first = [mask for mask, _ in itertools.islice(evaluator.evaluate_many(tiny_llm, masks), 2)]
    assert len(first) == 2
    assert {mask for mask, _ in evaluator.evaluate_many(tiny_llm, masks)} == set(masks)


def test_other_threads_than_the_workers_have_are_refused(workers, tiny_llm, masks):
    evaluator = RemoteEvaluator(PerplexityEvaluator(cases.WINDOWS, "text"), workers)
    next(evaluator.evaluate_many(tiny_llm, masks))
    torch.set_num_threads(2)
    try:
        with pytest.raises(WorkersFailed, match=r"another model: threads \(2 in this process, 1 in the worker\)"):
            list(evaluator.evaluate_many(tiny_llm, masks))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (cases.load_other_tiny, WorkersFailed, r"not get the results of this process: model \(\w{64} in this"),
        (cases.refuse_to_load, ModelUnavailable, "^no such folder$"),
        (cases.die_while_loading, WorkersFailed, "2 workers in a row died while they loaded the model"),
    ],
)
def test_workers_that_can_not_be_had_are_an_error(workers, ray, tiny_llm, masks, load, error, message):
    workers.close()  # leaves room
    other = Workers(load, n_workers=1, max_deaths=2)
    for _again in range(2):
        with pytest.raises(error, match=message):
            list(RemoteEvaluator(PerplexityEvaluator(cases.WINDOWS, "text"), other).evaluate_many(tiny_llm, masks))


def test_workers_for_which_there_is_no_room_are_an_error(ray, threads, tiny_llm, masks):
    workers = Workers(build_tiny_llm, n_workers=1, num_gpus=1, start_seconds=0.5)
    with pytest.raises(WorkersFailed, match=r"no worker of 1 CPUs and 1 GPUs has started within 0 s; free .*'CPU'"):
        list(workers.evaluate_many(PerplexityEvaluator(cases.WINDOWS, "text"), tiny_llm, masks))


@pytest.mark.parametrize(("n_masks", "sizes"), [(1, [1]), (4, [1] * 4), (9, [3, 3, 3]), (26, [4] * 6 + [2])])
def test_few_masks_are_dealt_to_all_workers_and_many_in_batches(n_masks, sizes, masks):
    cut = batches(masks[:n_masks], n_workers=2, batch_masks=4)
    assert [len(batch) for batch in cut] == sizes
    assert [mask for batch in cut for mask in batch] == sorted(masks[:n_masks], key=lambda mask: mask.keep)


@pytest.mark.parametrize("option", [{"n_workers": 0}, {"batch_masks": True}, {"max_deaths": 1.5}])
def test_numbers_that_no_pool_can_have_are_refused(option):
    with pytest.raises(InvalidConfig, match=rf"workers.{next(iter(option))}: expected a whole number of at least 1"):
        Workers(build_tiny_llm, **option)


def test_evaluators_travel_without_what_they_hold_of_a_model(tiny_llm, masks):
    evaluator = DivergenceEvaluator(cases.WINDOWS, "text")
    list(evaluator.evaluate_many(tiny_llm, masks[:2], near=masks[0]))
    assert evaluator._held and evaluator._dense
    copy = pickle.loads(data := pickle.dumps(evaluator))
    assert len(data) < 5000 and copy.identity == evaluator.identity and copy._held is copy._dense is None
