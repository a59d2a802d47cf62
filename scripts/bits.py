"""Chooses a number format for each site: `python -m scripts.bits budget_bytes=110_000_000 text=FILE out=bits.json`.

Options are KEY=VALUE. The last line says how runs take the choice; `load_llm` takes `weights` of the file.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rap_env.calibration.corpus import local_text
from rap_env.calibration.sampling import consecutive_windows
from rap_env.errors import RapError
from rap_env.evaluation.perplexity import PerplexityEvaluator
from rap_env.files import write_once
from rap_env.importance.bits import MixedFormats
from rap_env.llm.loading import load_llm
from scripts.options import parsed


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bits", description=__doc__.splitlines()[0])
    parser.add_argument("--budget_bytes", type=int, required=True, help="for all weights of the model")
    parser.add_argument("--text", type=Path, required=True, help="its first windows are what losses are measured on")
    parser.add_argument("--out", type=Path, required=True, help="a new JSON file")
    parser.add_argument("--model", default="smollm2-135m", help="embedded name, local folder or hub name")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--formats", default="int4", help="beside INT8, with commas between")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window_tokens", type=int, default=256)
    options = parsed(parser, arguments)
    try:
        if options.out.exists():
            raise FileExistsError(f"expected a new file; {options.out} exists")
        llm = load_llm(options.model, options.dtype)
        text = local_text(options.text)
        windows = consecutive_windows(text, llm.tokenizer, options.window_tokens, options.windows)
        mixed, evaluator = MixedFormats(llm), PerplexityEvaluator(windows, "text")
        table = mixed.table(evaluator, options.formats.split(","))
        weights = table.cheapest(options.budget_bytes)
        increases = {"predicted": table.increase(weights), "measured": mixed.loss(evaluator, weights) - table.loss}
        chosen = {"weights": weights, "weight_bytes": table.weight_bytes(weights), "increase": increases}
        write_once(options.out, json.dumps(chosen | {"table": asdict(table)}, indent=1) + "\n")
    except (RapError, OSError) as error:
        sys.exit(f"error: {error}")
    for row in sorted(table.rows, key=lambda row: row.increase):
        mark = "*" if row in table.chosen(weights) else " "
        print(f"{mark} {row.site:18} {row.weights:8} {row.weight_bytes:12,} bytes  loss {row.increase:+.5f}")
    print("loss {predicted:+.5f} predicted, {measured:+.5f} measured".format(**increases), f"above {table.loss:.5f}")
    print(
        f"{table.weight_bytes(weights):,} bytes, {len(weights)} of {len(table.sites)} sites not in int8: {options.out}"
    )
    print("'model.weights={" + ",".join(f"{site}:{each}" for site, each in weights.items()) + "}'")


if __name__ == "__main__":
    main(sys.argv[1:])
