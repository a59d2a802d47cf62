"""RAP's seven tasks as lm-eval defines them, on a few local rows of the same fields: they build, and equal HFLM."""

import math
from pathlib import Path

import lm_eval.tasks
import pytest

from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.mask import PruningMask
from tests.evaluation.lm_eval_cases import by_lm_eval, hf, write_rows

YAMLS = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
}


def science(stem: str, key: str, texts: list[str], labels: str) -> dict:
    return {"id": stem, "question": stem, "choices": {"text": texts, "label": list(labels)}, "answerKey": key}


ARC = [
    science("Which of these is a metal?", "B", ["wood", "iron", "wool", "glass"], "ABCD"),
    science("Which planet is the largest?", "3", ["Mars", "Earth", "Jupiter", "Venus"], "1234"),
    science("What do plants need?", "A", ["light", "sound", "plastic"], "ABC"),
]
BOOLQ = [
    ("The moon goes round the earth.", "is the moon a satellite", 1),
    ("Fish have gills.", "do fish have lungs", 0),
]
PIQA = [("To open a jar,", "twist the lid.", "shake the table.", 0), ("To dry hands,", "use water.", "use a towel.", 1)]
WINOGRANDE = [
    ("Ann asked Mary since _ knew.", "Ann", "Mary", "2"),
    ("The cup did not fit in the bag because the _ was too big.", "cup", "bag", "1"),
    ("The cup did not fit in the bag because the _ was too small.", "cup", "bag", "2"),
    ("Tom paid Bob, so _ had the money.", "Tom", "Bob", "2"),
]
HELLASWAG = [
    ("Baking", "A man [title] mixes flour.", "he", ["bakes it.", "drives it.", "sings [step] loudly.", "sleeps."], "0"),
    ("Rowing", "Two women sit in a boat.", "they", ["cook rice.", "row away.", "paint it.", "read it."], "1"),
]
ROWS = {
    "boolq": [{"passage": p, "question": q, "idx": i, "label": label} for i, (p, q, label) in enumerate(BOOLQ)],
    "piqa": [{"goal": goal, "sol1": one, "sol2": two, "label": label} for goal, one, two, label in PIQA],
    "hellaswag": [
        {"ind": i, "activity_label": a, "ctx_a": c, "ctx_b": d, "ctx": f"{c} {d}", "endings": e, "label": label}
        for i, (a, c, d, e, label) in enumerate(HELLASWAG)
    ],
    "winogrande": [{"sentence": s, "option1": a, "option2": b, "answer": label} for s, a, b, label in WINOGRANDE],
    "arc_easy": ARC,
    "arc_challenge": ARC[::-1],
    "openbookqa": [{"question_stem": row["question"]} | row for row in ARC[::2]],
}
FIRST_TEXTS = {  # context and right choice of the first row, by hand
    "boolq": "The moon goes round the earth.\nQuestion: is the moon a satellite?\nAnswer: yes",
    "piqa": "Question: To open a jar,\nAnswer: twist the lid.",
    "hellaswag": "Baking: A man. mixes flour. He bakes it.",
    "winogrande": "Ann asked Mary since Mary knew.",
    "arc_easy": "Question: Which of these is a metal?\nAnswer: iron",
    "arc_challenge": "Question: What do plants need?\nAnswer: light",
    "openbookqa": "Which of these is a metal? iron",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """lm-eval's own YAMLs, each with local rows for its data set."""
    folder = tmp_path_factory.mktemp("public")
    for task, path in YAMLS.items():
        write_rows(folder, task, ROWS[task])
        files = ", ".join(f"{split}: {folder}/{task}.jsonl" for split in ("train", "validation", "test"))
        (folder / f"{task}.yaml").write_text(
            f"include: {Path(lm_eval.tasks.__file__).parent / path}\ntask: {task}\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs: {{data_files: {{{files}}}, cache_dir: {folder}/cache}}\n"
        )
    return folder


@pytest.mark.parametrize("dropped", [(), ("layer0.mlp", "layer3.attention")], ids=["dense", "pruned"])
def test_all_seven_equal_lm_evals_own_adapter(tiny_llm, folder, dropped):
    with tiny_llm.pruned(PruningMask.all_kept(tiny_llm.shape).drop(*dropped)):
        ours = HarnessEvaluator(list(YAMLS), folder).evaluate(tiny_llm)
        theirs, _ = by_lm_eval(hf(tiny_llm), list(YAMLS), folder)
    assert set(theirs) == set(ours.tasks) == set(YAMLS)
    assert {task: {metric: ours.tasks[task][metric] for metric in theirs[task]} for task in theirs} == theirs
    assert ours.score == pytest.approx(sum(metrics["acc"] for metrics in theirs.values()) / 7)


def test_the_right_choices_are_those_of_the_data_sets(folder):
    texts = HarnessEvaluator(list(YAMLS), folder).item_texts
    assert {task: found[0] for task, found in texts.items()} == FIRST_TEXTS
    assert texts["winogrande"][2:] == [
        "The cup did not fit in the bag because the bag was too small.",
        "Tom paid Bob, so Bob had the money.",
    ]


@pytest.mark.llm
def test_winogrande_is_scored_by_its_contexts(embedded_llm_float32, folder):
    llm = embedded_llm_float32
    ours = HarnessEvaluator("winogrande", folder, half="report").evaluate(llm).tasks["winogrande"]
    theirs, responses = by_lm_eval(hf(llm), ["winogrande"], folder, samples={"winogrande": [1, 3]})
    assert ours["acc"] == theirs["winogrande"]["acc"]
    (cup, bag), (tom, bob) = zip(*[iter(float(r[0]) for r in responses["winogrande"])] * 2, strict=True)
    expected = [1 / (1 + math.exp(bag - cup)), 1 / (1 + math.exp(tom - bob))]
    assert ours["smooth_acc"] == pytest.approx(sum(expected) / 2, rel=1e-3)
