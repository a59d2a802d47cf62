"""Serves a model over HTTP, in OpenAI's protocols, while its memory may be taken away: `python -m scripts.endpoint`.

Options are KEY=VALUE. There is no authentication: whoever reaches the port may ask. docs/serving.md says how to try it.
"""

import argparse
import sys
from pathlib import Path

import uvicorn

from experiments.recipes.served import model_and_deciders
from rap_env.errors import RapError
from rap_env.serving.assembly import assemble
from rap_env.serving.endpoint import create_app
from rap_env.serving.engine import Options
from rap_env.serving.readings import BudgetFile
from rap_env.serving.switching import RESTORING
from scripts.options import parsed


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.endpoint", description=__doc__)
    parser.add_argument("--model.name", dest="name", default="smollm2-135m", help="embedded name, folder or hub name")
    parser.add_argument("--model.granularity", dest="granularity", default="group", help="group or block")
    parser.add_argument("--model.dtype", dest="dtype", default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument("--host", default="127.0.0.1", help="there is no authentication: think before you change it")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--policy", type=Path, help="folder of a saved policy; without one, all layers lose alike")
    parser.add_argument("--run", type=Path, help="a run's folder instead: its model and its policy")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--budget_bytes", type=int, help="for weights, KV cache and activations; else what is free")
    budget.add_argument("--budget_file", type=Path, help="holds that number, and is read again at each step")
    parser.add_argument("--reserve_bytes", type=int, default=2**28, help="that stay free where no budget is given")
    parser.add_argument("--max_batch", type=int, default=16, help="sequences in flight at most")
    parser.add_argument("--max_waiting", type=int, default=64, help="sequences that may wait beside them")
    parser.add_argument("--max_body_bytes", type=int, default=2**20, help="of a call")
    parser.add_argument("--patience_seconds", type=float, default=10.0, help="how long one waits for memory")
    parser.add_argument("--restoring", choices=RESTORING, default="left out", help="what heads mean that come back")
    options = parsed(parser, arguments)
    read = options.reserve_bytes if options.budget_bytes is None else lambda: options.budget_bytes
    try:
        read = BudgetFile(options.budget_file) if options.budget_file else read
        print(f"loading {options.run or options.name}, then reading once at each width: minutes", file=sys.stderr)
        of_model = options.name, options.dtype, options.granularity
        llm, deciders = model_and_deciders(options.run, options.policy, *of_model)
        how = Options(options.max_batch, restoring=options.restoring, patience_seconds=options.patience_seconds)
        service, metrics = assemble(llm, deciders, read, how, max_waiting=options.max_waiting)
    except (RapError, OSError) as error:
        sys.exit(f"error: {error}")
    app = create_app(service, llm, metrics, options.max_body_bytes)
    uvicorn.run(app, host=options.host, port=options.port, timeout_graceful_shutdown=5)


if __name__ == "__main__":
    main(sys.argv[1:])
