"""Multiple-choice tasks over random rows, made of hard pieces: the metrics are lm-eval's own, or both refuse.

lm-eval ends with errors of many types there, some of them after it has forwarded everything; ours with one
`EvaluationFailed`, before anything is forwarded, in one line that names the task and the row. lm-eval's rules are kept
also where they are odd: a label that no choice has, -1 and the texts of numbers among them, is never right; `True` is
1; the first row may hold neither an empty choice nor a label out of range, because lm-eval tries it when it loads the
task, while later rows may.
"""

import contextlib
import io
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rap_env.errors import EvaluationFailed
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.llm.loading import build_tiny_llm
from rap_env.mask import PruningMask
from tests.evaluation.lm_eval_cases import METRIC, by_lm_eval, hf, write_task

LOADER = """
import json
import pathlib
from datasets import Dataset

def load(**_):
    rows = json.loads(pathlib.Path(__file__).with_name("rows.json").read_text())
    return {"validation": Dataset.from_list(rows)}
"""
YAML = """
task: toy
output_type: multiple_choice
custom_dataset: !function rows.load
validation_split: validation
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list:
"""
QUESTIONS = [
    "The sky is",
    "The sky",
    "",
    " ",
    "\t\n",
    "<end>",
    "<end>a",
    "a ",
    "中文",
    "e\u0301",
    "a long question " * 4,
]
CHOICES = ["blue", "blue sky", "", " ", "b", "<end>", "中", "\U0001f642", "0", "1"]
WELL = {"question": "The sky is", "choices": ["blue", "red red"], "gold": 0}
# A column has one type, or none at all (null): labels of one list stand together in a task.
LABELS = [
    st.integers(-3, 3) | st.sampled_from([0, 1]),
    st.sampled_from([0, 1, -1, None]),
    st.sampled_from(["blue", "b", "0", "1", "-1", "no such choice", "", " "]),
    st.sampled_from(["blue", "b", None]),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 0.5]),
    st.lists(st.integers(-1, 3), max_size=2),
    st.lists(st.integers(0, 1), min_size=1, max_size=2),
    st.just(None),
]


ALL = [1, 1, 1, 1]
# The first attention stays: without any, contexts tell nothing, and all choices' mutual information is equal.
MASKS = st.tuples(st.just(1), *[st.integers(0, 1)] * 3).map(list)
METRICS = [("acc", "acc_norm"), ("acc_mutual_info", "acc"), ("exact_match", "acc_bytes")]


@st.composite
def row_lists(draw) -> list[dict]:
    labels = draw(st.sampled_from(LABELS))
    questions = st.sampled_from(QUESTIONS) | st.just("The sky is")
    choices = st.lists(st.sampled_from(CHOICES), min_size=draw(st.integers(0, 2)), max_size=4)
    if draw(st.integers(0, 9)) == 0:
        choices = st.none() | st.lists(st.sampled_from([None, "blue"]), max_size=2)
        questions = st.none() | questions
    row = st.fixed_dictionaries({"question": questions, "choices": choices, "gold": labels})
    if draw(st.integers(0, 4)) == 0:  # as in winogrande: the choices are contexts, and the question is the label
        row = st.fixed_dictionaries({"question": labels, "choices": choices, "gold": questions})
    return draw(st.lists(row, min_size=1, max_size=4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "rows.py").write_text(LOADER)
    return folder


@pytest.fixture(scope="module")
def llm():
    return build_tiny_llm(n_layers=2)


def metrics_by_lm_eval(llm, folder) -> dict[str, float] | None:
    """None where it ends with an error, whatever its type; that it divides by the length of an empty choice is none."""
    with np.errstate(divide="ignore", invalid="ignore"), contextlib.redirect_stderr(io.StringIO()):
        try:
            return by_lm_eval(hf(llm), ["toy"], folder)[0]["toy"]
        except Exception:
            return None


def write(folder, rows: list[dict], metrics=METRICS[0]) -> None:
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "toy.yaml").write_text(YAML + "".join(METRIC.format(metric, "mean") for metric in metrics))


def assert_equal_or_both_refuse(llm, folder, rows: list[dict], metrics, bits) -> None:
    write(folder, rows, metrics)
    with llm.pruned(PruningMask.from_bits(llm.shape, bits)):
        expected = metrics_by_lm_eval(llm, folder)
        before = llm.site_executions
        if expected is None:
            with pytest.raises(EvaluationFailed, match=r"\Atask 'toy', (of which lm-eval looks at )?item \d+[^\n]*\Z"):
                HarnessEvaluator("toy", folder, metric=metrics[0]).evaluate(llm)
            assert llm.site_executions == before
        else:
            found = HarnessEvaluator("toy", folder, metric=metrics[0]).evaluate(llm).tasks["toy"]
            assert {name: found[name] for name in expected} == expected
            assert 0.0 <= found["smooth_acc"] <= 1.0 + 1e-9


@settings(deadline=None, derandomize=True, database=None, max_examples=30)
@given(rows=row_lists(), metrics=st.sampled_from(METRICS), bits=MASKS)
@example([WELL, WELL | {"gold": -3}], METRICS[0], ALL)  # each of these was a traceback
@example([WELL, WELL | {"gold": None}], METRICS[0], ALL)
@example([WELL | {"gold": 1.0}], METRICS[0], ALL)
@example([WELL | {"gold": [0]}, WELL | {"gold": []}], METRICS[0], ALL)
@example([WELL | {"gold": 2}], METRICS[0], ALL)
@example([WELL, WELL | {"choices": []}], METRICS[0], ALL)
@example([WELL, WELL | {"choices": None}], METRICS[0], ALL)
@example([WELL, WELL | {"choices": ["blue", None]}], METRICS[0], ALL)
@example([WELL | {"choices": ["", "blue"]}], METRICS[0], ALL)
@example([WELL, WELL, WELL | {"question": None}, WELL], METRICS[0], ALL)
@example([], METRICS[0], ALL)
@example([WELL | {"gold": -1}], METRICS[2], ALL)
def test_metrics_of_random_rows_equal_lm_evals_or_both_refuse(llm, folder, rows, metrics, bits):
    assert_equal_or_both_refuse(llm, folder, rows, metrics, bits)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([WELL, WELL, WELL | {"question": None}, WELL], "item 2: .* AssertionError: Context is not a string"),
        ([WELL, WELL | {"gold": None}], "item 1: .* TypeError: tuple indices must be integers"),
        ([WELL, WELL | {"choices": []}], "item 1: it has no choices"),
        ([WELL, WELL, WELL | {"choices": None}], "item 2: .* TypeError: 'NoneType' object is not iterable"),
        ([WELL | {"gold": 2}, WELL], "of which lm-eval looks at item 0: .* IndexError: list index out of range"),
        ([], "of which lm-eval looks at item 0: .*"),
    ],
    ids=["no question", "no label", "empty choices", "no choices", "label out of range", "no rows"],
)
def test_the_row_that_lm_eval_stumbles_over_is_named(folder, rows, message):
    write(folder, rows)
    with pytest.raises(EvaluationFailed, match=rf"\Atask 'toy',? {message}[^\n]*\Z"):
        HarnessEvaluator("toy", folder)


def test_a_metric_that_lm_eval_cannot_average_is_refused_before_anything_is_forwarded(tmp_path):
    rows = [WELL, WELL | {"choices": ["a", "b", "c"]}]
    write_task(tmp_path, "toy", rows, ["acc", "brier_score"])  # it wants as many choices in every row
    with pytest.raises(EvaluationFailed, match=r"\Atask 'toy': its data or its functions don't suit .*: ValueError"):
        HarnessEvaluator("toy", tmp_path)
