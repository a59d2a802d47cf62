"""What holds for all masks, workloads, budgets, policies, records and tasks, not only for those in other tests."""

import json
import random
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.records import read_record, write_record
from rap_env.errors import InfeasibleBudget, InvalidMask, InvalidWorkload, RapError, UnknownName
from rap_env.evaluation.table import load_tables
from rap_env.evaluation.task_loading import build_requests, load_tasks
from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.shape import ModelShape
from rap_env.mask import PruningMask
from rap_env.memory.footprint import dense_bytes, footprint, smallest_bytes
from rap_env.memory.projection import Projection
from rap_env.memory.workload import Workload
from rap_env.policies import load_policy, save_policy
from tests.evaluation.lm_eval_cases import write_task
from tests.hardening.decisions import POLICIES, over_budget, random_scenario
from tests.hardening.model_subjects import grouped

SHAPES = {"blocks": build_tiny_llm().shape, "parts": grouped().shape}
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEW = settings(FAST, max_examples=12)

shapes = st.sampled_from(list(SHAPES.values()))
workloads = st.builds(Workload, st.integers(1, 64), st.integers(1, 30), st.integers(0, 30))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def shaped_masks(draw, of=shapes):
    shape = draw(of)
    return shape, PruningMask.from_bits(shape, [draw(st.booleans()) for _ in shape.components])


@FAST
@given(shaped_masks())
def test_a_mask_comes_back_from_json_as_it_was(shaped):
    shape, mask = shaped
    again = PruningMask.from_json(shape, mask.to_json())
    assert again == mask and again.digest == mask.digest and hash(again) == hash(mask)


@FAST
@given(shapes, st.text() | json_values.map(json.dumps))
def test_any_other_text_is_refused_as_a_mask(shape, text):
    with pytest.raises((InvalidMask, UnknownName)):
        PruningMask.from_json(shape, text)


@FAST
@given(shaped_masks(), workloads, st.data())
def test_bytes_grow_with_what_is_kept_with_the_batch_and_with_tokens(shaped, work, data):
    shape, mask = shaped
    peak = footprint(shape, mask, work).peak_bytes
    assert smallest_bytes(shape, work) <= peak <= dense_bytes(shape, work)
    dropped = data.draw(st.sampled_from(shape.components))
    assert footprint(shape, mask.drop(dropped.name), work).peak_bytes <= peak
    larger = data.draw(
        st.sampled_from(
            [
                Workload(work.batch_size + 1, work.prompt_tokens, work.generated_tokens),
                Workload(work.batch_size, work.prompt_tokens + 1, work.generated_tokens),
                Workload(work.batch_size, work.prompt_tokens, work.generated_tokens + 1),
            ]
        )
    )
    of_larger = footprint(shape, mask, larger)
    assert of_larger.peak_bytes >= peak and of_larger.total_bytes >= footprint(shape, mask, work).total_bytes


@FAST
@given(
    shapes,
    workloads,
    st.floats(0.0, 1.2),
    st.sampled_from([("exact", "magnitude"), ("nested", "magnitude"), ("exact", "affine"), ("nested", "affine")]),
    st.integers(0, 2**32),
)
def test_a_projection_meets_every_budget_that_can_be_met(shape, work, share, how, seed):
    rng = random.Random(seed)
    action = [rng.choice([rng.uniform(-2, 2), 0.0, 1e30, -1e-30]) for _ in shape.components.sites]
    smallest, dense = smallest_bytes(shape, work), dense_bytes(shape, work)
    budget_bytes = smallest + int(share * (dense - smallest))
    mask = Projection(how[0], reading=how[1]).mask(shape, action, work, budget_bytes)
    assert footprint(shape, mask, work).peak_bytes <= budget_bytes
    assert mask.nested == mask
    with pytest.raises(InfeasibleBudget):
        Projection(how[0], reading=how[1]).mask(shape, action, work, smallest - 1)


@FAST
@given(st.lists(st.integers() | st.floats() | st.none() | st.text() | st.booleans(), min_size=3, max_size=3))
def test_a_workload_is_of_whole_numbers_or_refused(values):
    try:
        work = Workload(*values)
    except InvalidWorkload:
        return
    assert values == [work.batch_size, work.prompt_tokens, work.generated_tokens]
    assert all(value == int(value) for value in values) and work.batch_size >= 1 and work.prompt_tokens >= 1


@pytest.mark.parametrize("kind", POLICIES)
@settings(FEW, max_examples=6)
@given(shape=shapes, seed=st.integers(0, 1000))
def test_a_saved_policy_decides_as_it_did(kind, shape, seed, tmp_path):
    policy = POLICIES[kind](shape, seed)
    again, rng = load_policy(save_policy(policy, tmp_path)), random.Random(seed)
    for _ in range(3):
        scenario = random_scenario(shape, rng)
        assert again.decide(*scenario) == policy.decide(*scenario)


@pytest.mark.parametrize("kind", POLICIES)
def test_no_decision_is_over_budget(kind):
    for shape in SHAPES.values():
        assert over_budget(kind, shape, 30) == []
    assert over_budget(kind, load_tables().shape, 1) == []


@FAST
@given(shapes)
def test_a_shape_comes_back_from_json_as_it_was(shape):
    assert ModelShape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


@FEW
@given(st.dictionaries(st.text(), json_values, max_size=3), json_values)
def test_a_record_comes_back_as_it_was(tmp_path, more, results):
    path = tmp_path / "record.json"
    path.unlink(missing_ok=True)
    record = more | {"config": {}, "provenance": {}, "results": results}
    try:
        write_record(path, record)
    except (ValueError, TypeError):  # text that no file holds
        assert not path.exists()
        return
    assert read_record(path) == record


texts = st.text(string.ascii_letters + " .?{}[]'\"\\\n\té€", min_size=1, max_size=20)
task_rows = st.lists(
    st.fixed_dictionaries(
        {"question": texts, "choices": st.lists(texts, min_size=2, max_size=3), "gold": st.integers(-2, 3)}
    ),
    min_size=1,
    max_size=3,
)


@settings(FEW, max_examples=8)
@given(task_rows)
def test_a_task_of_any_rows_is_loaded_or_refused(tmp_path_factory, rows):
    folder = write_task(tmp_path_factory.mktemp("task"), "toy", rows)
    try:
        (task,) = load_tasks(["toy"], folder).values()
        build_requests("toy", task, range(len(task.eval_docs)))
    except RapError as error:
        assert "toy" in str(error)
        return
    assert [instance.args[0] for instance in task.instances if instance.idx == 0] == [row["question"] for row in rows]
