"""Measures what serving with a ladder of masks costs: `python -m experiments.serving_table FILE`.

The masks keep an equal share of the parts of each site. Without `--losses` a table has losses that stand in for
measured ones: they lie where docs/results.md has masks of as many bytes, and are of no mask in particular.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import rap_env
from experiments.progress import phase
from rap_env.llm.live import LiveModel
from rap_env.llm.switchable import SwitchableLLM
from rap_env.llm.weights import WeightStore
from rap_env.mask import PruningMask
from rap_env.serving.timing import Ladder, measure_table

_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_STAND_INS = (0.0, 0.05, 0.12, 0.25, 0.45, 0.8, 1.4, 2.2)
_STAND_INS_ARE = (
    "stand-ins after the figures of docs/results.md for masks of as many bytes; not measured for these masks"
)
STAND_INS = {"shares": _SHARES, "losses_over_dense": _STAND_INS, "losses_are": _STAND_INS_ARE}  # of `even_ladder`


def even_ladder(
    llm: SwitchableLLM, shares: Sequence[float], losses_over_dense: Sequence[float], losses_are: str
) -> Ladder:
    """Masks that keep an equal share of the parts of each site, named by it.

    Args:
        llm: Its sites have parts.
        shares: From 1 down.
        losses_over_dense: What each costs, in nats.
        losses_are: Where these are from.
    """
    parts = llm.shape.components.n_parts
    masks = tuple(PruningMask.from_widths(llm.shape, [round(share * n) for n in parts]) for share in shares)
    return Ladder(masks, tuple(f"{share:.0%}" for share in shares), tuple(losses_over_dense), losses_are)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, measures, writes the table, and prints how far the fit is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="JSON file to write; it must not exist")
    parser.add_argument("--model", default="smollm2-135m", help="as load_llm takes it")
    parser.add_argument("--shares", type=float, nargs="+", default=_SHARES, help="of each site's parts, from 1 down")
    parser.add_argument("--losses", type=float, nargs="+", help="over the dense model's, one for each share, in nats")
    parser.add_argument("--losses-are", default="as given on the command line", help="where the losses are from")
    parser.add_argument("--repeats", type=int, default=5, help="how often each step and switch is timed")
    options = parser.parse_args(arguments)
    if options.table.exists():
        parser.error(f"{options.table} exists, and tables are not written over")
    losses, losses_are = (options.losses, options.losses_are) if options.losses else (_STAND_INS, _STAND_INS_ARE)
    if len(losses) != len(options.shares):
        parser.error(f"expected a loss for each of the {len(options.shares)} shares; there are {len(losses)}")
    llm = rap_env.load_llm(options.model, granularity="group")
    WeightStore(llm)
    with phase("timing") as progress:
        ladder = even_ladder(llm, options.shares, losses, losses_are)
        table = measure_table(LiveModel(llm), ladder, repeats=options.repeats, progress=progress)
    table.save(options.table)
    for name, errors in table.measured["relative_errors"].items():
        print(f"{name}: {errors['median']:.1%} off on the median, {errors['largest']:.1%} at most ({errors['cases']})")


if __name__ == "__main__":
    main()
