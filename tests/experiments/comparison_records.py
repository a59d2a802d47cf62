"""Records of a comparison that nobody ran: four agents on a model of four layers, with scores by a simple rule."""

from typing import Any

WORKLOADS, RATIOS, LAYERS = ((1, 512), (16, 2048)), (0.9, 0.6), 4
COMPONENTS = [f"layer{layer}.{kind}" for layer in range(LAYERS) for kind in ("attention", "mlp")]
COMMIT = "0123456789abcdef"


def row(workload: tuple[int, int], ratio: float, loss: float, dropped: list[str], violation: bool = False) -> dict:
    """A scenario's row: `loss` on the search half, a quarter more on the report half, accuracy 1 - loss / 10."""
    accuracy = 1 - loss / 10
    return {
        "batch_size": workload[0],
        "prompt_tokens": workload[1],
        "generated_tokens": 0,
        "budget_bytes": int(ratio * 1e9 * workload[0]),
        "budget_ratio": ratio,
        "dropped": dropped,
        "footprint": {"peak_bytes": 500_000_000},
        "violation": violation,
        "decision_milliseconds": 0.5,
        "best_evaluated": -loss,
        "search": {"score": -loss, "tasks": {"search text": {"loss": loss, "perplexity": 1.0, "items": 4}}},
        "reports": {
            "text": {
                "score": -1.25 * loss,
                "reward": -1.25 * loss - violation,
                "reward_terms": {"accuracy": -1.25 * loss},
                "tasks": {"text": {"loss": 1.25 * loss, "perplexity": 1.0, "items": 8}},
            },
            "tasks": {
                "score": accuracy,
                "reward": accuracy,
                "reward_terms": {"accuracy": accuracy, "smooth_accuracy": accuracy / 2},
                "tasks": {"capitals": {"acc": accuracy, "items": 10}},
            },
        },
    }


def record(agent: str, seed: int, rows: list[dict], evaluations: int = 0, tokens: int = 0, **details) -> dict[str, Any]:
    """A record with the given rows; the dense model has loss 2 on the search half."""
    return {
        "config": {"model": {"name": "toy"}, "token_budget": 2000, "agent": {"_target_": agent}, "seed": seed},
        "provenance": {
            "model_digest": "0",
            "git": {"commit": COMMIT, "dirty": False},
            "versions": {},
            "hardware": {"cpu": "toy processor"},
            "numeric_platform": {"device": "cpu", "features": ["avx2"]},
        },
        "results": {
            "agent": agent,
            "seed": seed,
            "components": COMPONENTS,
            "evaluators": ["text", "tasks"],
            "dense": {"search": -2.0, "text": -2.5, "tasks": 0.8},
            "search": {
                "token_budget": 2000,
                "tokens": tokens or 100 * evaluations,
                "evaluations": evaluations,
                "fresh_evaluations": 0,
                "seconds": 1.0,
                "measured_seconds": 2.5 * evaluations,
                "ranking_tokens": tokens,
                "details": details,
            },
            "anytime": [[400, -4.0], [900, -3.5], [100 * evaluations, -3.5]] if evaluations else [],
            "rows": rows,
            "references": {"dense": [row(workload, 0.9, 2.0, [], True) for workload in WORKLOADS]},
            "held_out": {"decisions": 10, "violations": 10 * rows[0]["violation"]},
        },
    }


def records() -> list[dict[str, Any]]:
    """Dense violates everything, greedy ignores the workload, the learned agent drops what its workload asks for."""
    scenarios = [(workload, ratio) for workload in WORKLOADS for ratio in RATIOS]
    made = [record("dense", 0, [row(workload, ratio, 2.0, [], True) for workload, ratio in scenarios])]
    greedy = [row(w, r, 4.0 - r, COMPONENTS[: 1 + (r < 0.8)]) for w, r in scenarios]
    made.append(record("greedy", 0, greedy, tokens=600))
    for seed in range(2):
        learnt = [
            row(w, r, 3.5 - r + 0.1 * seed, [name for name in COMPONENTS if ("mlp", "attention")[w[0] > 1] in name][:2])
            for w, r in scenarios
        ]
        made.append(record("learned", seed, learnt, 20, learning_curve=[[16, -1.0], [32, 0.0], [48, 0.5]]))
        losses = [row(w, r, 6.0 + seed, COMPONENTS[seed : seed + 3]) for w, r in scenarios]
        made.append(record("random", seed, losses))
    return made
