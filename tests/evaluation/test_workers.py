"""Workers: masks evaluated by Ray actors get exactly the results of one process, whoever dies meanwhile."""

import itertools
import pickle
import sys

import numpy as np
import pytest
import torch

from rap_env.errors import InvalidConfig, ModelUnavailable, WorkersFailed
from rap_env.evaluation.divergence import DivergenceEvaluator
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.evaluation.meter import Meter
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.evaluation.remote import RemoteEvaluator
from rap_env.evaluation.store import ResultStore
from rap_env.evaluation.workers import Workers, batches
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from tests.evaluation import worker_cases as cases

TEXT = PerplexityEvaluator(cases.WINDOWS, "text")


@pytest.fixture(autouse=True)
def one_thread():
    """Workers have as many threads as this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def masks(tiny_llm) -> list[PruningMask]:
    """Thirty masks, the dense one and the deadly one among them."""
    dense = PruningMask.all_kept(tiny_llm.shape)
    bits = np.random.default_rng(0).random((40, len(dense.keep))) < 0.7
    random = [PruningMask(dense.components, tuple(row.tolist())) for row in bits]
    return list(dict.fromkeys([dense, dense.drop(cases.DEADLY), *random]))[:30]


@pytest.fixture
def fake_ray(monkeypatch) -> cases.FakeRay:
    fake = cases.FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    return fake


def remote(evaluator, load=build_tiny_llm, **options) -> RemoteEvaluator:
    return RemoteEvaluator(evaluator, Workers(load, **options))


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_in_the_middle_equal_one_process_exactly(tiny_llm, masks, tmp_path, store):
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        workers = Workers(build_tiny_llm, n_workers=2, batch_masks=3)
        evaluator, found = cases.DeadlyEvaluator(tmp_path), {}
        for mask, evaluation in RemoteEvaluator(evaluator, workers).evaluate_many(tiny_llm, masks):
            assert mask not in found
            found[mask] = evaluation
            if len(found) == 1:  # the other one may still start; who has answered has a second batch
                ray.kill(next(slot.actor for slot in workers._slots if slot.is_ready))
        assert sum(workers._deaths.values()) >= 1
        expected = dict(evaluator.evaluate_many(tiny_llm, masks))
        assert len(found) == len(masks) and found == expected

        inner = DivergenceEvaluator(cases.WINDOWS, "text")
        of_workers = Meter(tiny_llm, RemoteEvaluator(inner, workers), store)
        assert len(of_workers.ensure_known(masks, near=masks[0])) == len(masks)
        local, alone = Meter(tiny_llm, inner, store), Meter(tiny_llm, inner)
        assert local.ensure_known(masks) == set() and local.budget.spent == of_workers.budget.spent
        assert alone.evaluate(masks) == local.evaluate(masks) == of_workers.evaluate(masks)
    finally:
        ray.shutdown()


def test_a_mask_that_ends_every_worker_is_named_and_costs_no_other(fake_ray, tiny_llm, masks, location, tmp_path):
    store = ResultStore(location)
    for life in range(9):
        (tmp_path / f"life{life}").touch()
    evaluator = cases.DeadlyEvaluator(tmp_path)
    meter = Meter(tiny_llm, remote(evaluator, n_workers=2), store)
    with pytest.raises(WorkersFailed, match=rf"3 workers died while .* the mask that drops {cases.DEADLY}; what is"):
        meter.evaluate(masks)
    assert (len(list(tmp_path.glob("life*"))), fake_ray.started) == (9 - 3, 2 + 2)
    known = len(store)
    assert known == meter.fresh_evaluations > 0
    for life in tmp_path.glob("life*"):
        life.unlink()
    assert len(meter.ensure_known(masks)) == len(masks) - known  # a vacant place is filled, and nothing is claimed
    assert fake_ray.started == 2 + 3
    assert {mask: meter.known[mask] for mask in masks} == dict(evaluator.evaluate_many(tiny_llm, masks))
    store.close()


def test_whoever_is_asked_first_each_mask_is_evaluated_once(fake_ray, tiny_llm, masks, tmp_path):
    evaluator = cases.DeadlyEvaluator(tmp_path)
    found = list(remote(evaluator, n_workers=3, batch_masks=4).evaluate_many(tiny_llm, masks))
    assert len(found) == len(dict(found)) == len((tmp_path / "measured").read_text().splitlines()) == len(masks)
    assert dict(found) == dict(evaluator.evaluate_many(tiny_llm, masks))


def test_a_remote_evaluator_is_known_by_the_same_names_and_costs(tiny_llm):
    inner = DivergenceEvaluator(cases.WINDOWS, "text")
    outer = remote(inner)
    assert Meter(tiny_llm, outer).identity(tiny_llm.mask) == Meter(tiny_llm, inner).identity(tiny_llm.mask)
    assert (outer.name, outer.setup_tokens, outer.tokens(tiny_llm)) == ("text", 160, 160)
    assert outer.first(1.0) is outer
    assert isinstance(outer.first(0.5), RemoteEvaluator) and outer.first(0.5).identity == inner.first(0.5).identity
    items = HarnessEvaluator("rap_recall_128_search", limit=2)
    assert remote(items).right_answers(tiny_llm) == items.right_answers(tiny_llm) != []


def test_what_an_evaluator_raises_in_a_worker_is_raised_here_and_the_worker_stays(fake_ray, tiny_llm, masks):
    outer = remote(cases.FailingEvaluator(), n_workers=1)
    for _again in range(2):
        with pytest.raises(ModelUnavailable, match=r"^the weights are gone$"):
            list(outer.evaluate_many(tiny_llm, masks[:3]))
    assert fake_ray.started == 1


def test_who_stops_early_leaves_no_answers_behind(fake_ray, tiny_llm, masks):
    outer = remote(TEXT)
    assert len(list(itertools.islice(outer.evaluate_many(tiny_llm, masks), 2))) == 2
    assert {mask for mask, _ in outer.evaluate_many(tiny_llm, masks)} == set(masks)
    assert fake_ray.started == 2


def test_other_threads_than_the_workers_have_are_refused(fake_ray, tiny_llm, masks):
    outer = remote(TEXT)
    next(outer.evaluate_many(tiny_llm, masks))
    torch.set_num_threads(2)
    with pytest.raises(WorkersFailed, match=r"another model: threads \(2 in this process, 1 in the worker\)"):
        next(outer.evaluate_many(tiny_llm, masks))


def refuse_to_load():
    raise ModelUnavailable("no such folder")


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (lambda: build_tiny_llm(seed=1), WorkersFailed, r"not get the results of this process: model \(\w{64} in this"),
        (refuse_to_load, ModelUnavailable, "^no such folder$"),
        (cases.die, WorkersFailed, "2 workers in a row died while they loaded the model"),
    ],
)
def test_workers_that_can_not_be_had_are_an_error(fake_ray, tiny_llm, masks, load, error, message):
    outer = remote(TEXT, load, n_workers=1, max_deaths=2)
    with pytest.raises(error, match=message):
        next(outer.evaluate_many(tiny_llm, masks))
    outer.workers._load = build_tiny_llm  # as if the cause were mended
    assert len(list(outer.evaluate_many(tiny_llm, masks))) == len(masks)


def test_workers_for_which_there_is_no_room_are_an_error(fake_ray, tiny_llm, masks):
    fake_ray.has_room = False
    with pytest.raises(WorkersFailed, match=r"no worker of 1 CPUs and 2 GPUs has started within 600 s; free .*'CPU'"):
        next(remote(TEXT, num_gpus=2).evaluate_many(tiny_llm, masks))


def test_missing_ray_is_named_with_its_cure(monkeypatch, tiny_llm, masks):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkersFailed, match=r"pip install 'rap-env\[ray\]'"):
        next(remote(TEXT).evaluate_many(tiny_llm, masks))


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
