"""Records of a comparison that nobody ran: four agents on a model of four layers, with scores by a simple rule."""

from typing import Any

WORKLOADS, RATIOS, LAYERS = ((1, 512), (16, 2048)), (0.9, 0.6), 4
COMPONENTS = [f"layer{layer}.{kind}" for layer in range(LAYERS) for kind in ("attention", "mlp")]


def row(workload: tuple[int, int], ratio: float, loss: float, dropped: list[str], violation: bool = False) -> dict:
    """A scenario's row: `loss` on the search half, a quarter more on the report half, accuracy 1 - loss / 10."""
    return {
        "batch_size": workload[0],
        "prompt_tokens": workload[1],
        "generated_tokens": 0,
        "budget_bytes": int(ratio * 1e6 * workload[0]),
        "budget_ratio": ratio,
        "dropped": dropped,
        "footprint": {"peak_bytes": 1},
        "violation": violation,
        "score": -loss,
        "tasks": {"search text": {"loss": loss, "perplexity": 1.0}},
        "best_asked": -loss,
        "decision_milliseconds": 0.5,
        "reports": {
            "text": {"score": -1.25 * loss, "tasks": {"text": {"loss": 1.25 * loss, "perplexity": 1.0}}},
            "tasks": {"score": 1 - loss / 10, "tasks": {"capitals": {"acc": 1 - loss / 10}}},
        },
    }


def record(agent: str, seed: int, rows: list[dict], evaluations: int = 0, **details) -> dict[str, Any]:
    """A record with the given rows; the dense model has loss 2 on the search half."""
    return {
        "config": {
            "name": "toys",
            "model": {"name": "toy"},
            "max_evaluations": 20,
            "agent": {"_target_": agent},
            "seed": seed,
        },
        "provenance": {"model_digest": "0", "git": None, "versions": {}, "hardware": {}},
        "results": {
            "agent": agent,
            "seed": seed,
            "components": COMPONENTS,
            "judges": ["text", "tasks"],
            "dense": {"search": -2.0, "text": -2.5, "tasks": 0.8},
            "ranking": {"evaluations": 8, "tokens": 100, "seconds": 1.0},
            "search": {
                "evaluations": evaluations,
                "fresh_evaluations": evaluations,
                "calibration_tokens": 0,
                "seconds": 1.0,
                "peak_bytes": 2_000_000_000,
                "details": details,
            },
            "anytime": [[4, -4.0], [9, -3.5], [evaluations, -3.5]] if evaluations else [],
            "rows": rows,
            "unseen": {"decisions": 10, "violations": 10 * rows[0]["violation"]},
        },
    }


def records() -> list[dict[str, Any]]:
    """Dense violates everything, greedy ignores the workload, the learned agent drops what its workload asks for."""
    scenarios = [(workload, ratio) for workload in WORKLOADS for ratio in RATIOS]
    made = [record("dense", 0, [row(workload, ratio, 2.0, [], True) for workload, ratio in scenarios])]
    made.append(record("greedy", 0, [row(w, r, 4.0 - r, COMPONENTS[: 1 + (r < 0.8)]) for w, r in scenarios]))
    for seed in range(2):
        learnt = [
            row(w, r, 3.5 - r + 0.1 * seed, [name for name in COMPONENTS if ("mlp", "attention")[w[0] > 1] in name][:2])
            for w, r in scenarios
        ]
        made.append(record("learned", seed, learnt, 20, episodes={"gain_over_greedy": [-1.0, 0.0, 0.5, 0.5]}))
        losses = [row(w, r, 6.0 + seed, COMPONENTS[seed : seed + 3]) for w, r in scenarios]
        made.append(record("random", seed, losses))
    return made
