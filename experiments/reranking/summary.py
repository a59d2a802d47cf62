"""What the answers of a system come to: seconds, memory, and how well it ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from experiments.rerank_training.evaluation import ndcg
from experiments.reranking.requests import Request
from rap_env.rerank.outcomes import agreement

_NDCG_CUT = 10


@dataclass(frozen=True)
class Judges:
    """What rankings are held against.

    Attributes:
        requests: The requests, by number.
        full: Documents of each request in the full model's order, by number and candidates.
        grades: What people judged, by query and document; 1 and more are relevant.
    """

    requests: Sequence[Request]
    full: Mapping[tuple[int, int], Sequence[int]]
    grades: Mapping[str, Mapping[str, int]]


def summary(answers: Sequence[Mapping[str, Any]], judges: Judges, top_k: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each number of candidates and K.

    Seconds are medians over requests of medians over repeats; systems that rank all documents whatever K is have the
    same ones for every K. The peak is the highest of all repeats.

    Args:
        answers: Of one system.
        judges: What they are held against.
        top_k: Values of K.
    """
    rows = []
    for candidates in sorted({each["candidates"] for each in answers}):
        for k in top_k:
            own = [each for each in answers if each["candidates"] == candidates and each["top_k"] in (None, k)]
            if own:
                rows.append({"candidates": candidates, "top_k": k} | _row(own, judges, k))
    return rows


def _row(answers: Sequence[Mapping[str, Any]], judges: Judges, k: int) -> dict[str, Any]:
    by_request: dict[int, list[Mapping[str, Any]]] = {}
    for each in answers:
        by_request.setdefault(each["rank"], []).append(each)
    firsts = [of_request[0] for of_request in by_request.values()]
    read = [each["read_bytes"] for each in firsts]
    seconds = {number: [each["seconds"] for each in of_request] for number, of_request in by_request.items()}
    return {
        "seconds": median(median(values) for values in seconds.values()),
        "seconds_by_request": seconds,
        "peak_bytes": max(each["peak_bytes"] for each in answers),
        "agreement": mean(agreement(each["ids"][:k], _full(each, judges)[:k]) for each in firsts),
        "precision": mean(_precision(each, judges, k) for each in firsts),
        "ndcg_at_10": _ndcg(firsts, judges) if k >= _NDCG_CUT or answers[0]["top_k"] is None else None,
        "layers": mean(each["layers"] for each in firsts),
        "read_bytes": None if None in read else mean(read),
    }


def _full(answer: Mapping[str, Any], judges: Judges) -> Sequence[int]:
    return judges.full[answer["rank"], answer["candidates"]]


def _precision(answer: Mapping[str, Any], judges: Judges, k: int) -> float:
    names = _names(answer, judges)[:k]
    grades = judges.grades[judges.requests[answer["rank"]].name]
    return sum(grades.get(name, 0) > 0 for name in names) / len(names)


def _ndcg(answers: Sequence[Mapping[str, Any]], judges: Judges) -> float:
    run = {
        judges.requests[each["rank"]].name: {name: -float(place) for place, name in enumerate(_names(each, judges))}
        for each in answers
    }
    return mean(ndcg(judges.grades, run).values())


def _names(answer: Mapping[str, Any], judges: Judges) -> list[str]:
    documents = list(judges.requests[answer["rank"]].documents)
    return [documents[number] for number in answer["ids"]]
