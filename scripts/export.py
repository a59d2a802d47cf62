"""Exports a pruned model: `python -m scripts.export run=outputs/DATE/TIME scenario=1 format=hf out=FOLDER`.

Or any mask of a model: `python -m scripts.export model=smollm2-135m mask=mask.json format=hf out=FOLDER`. Options are
KEY=VALUE. docs/export.md says what each format can hold.
"""

import argparse
import sys
from pathlib import Path

from rap_env.calibration.corpus import local_text
from rap_env.errors import RapError
from rap_env.export.recovery import Recovery
from rap_env.export.save import FORMATS, export_pruned, read_mask
from rap_env.llm.loading import load_llm
from scripts.options import parsed

_OF_MODELS = ("name", "granularity", "dtype")  # as `load_llm` calls them


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run's folder, for the model as it had it and its masks")
    parser.add_argument("--scenario", type=int, help="which of its reported masks; without a number they are listed")
    parser.add_argument("--mask", type=Path, help="a file that PruningMask.to_json wrote")
    parser.add_argument("--model", dest="name", help="without run: embedded name, local folder or hub name")
    parser.add_argument("--granularity", help="without run: that of the mask, block (default) or group")
    parser.add_argument("--dtype", help="without run: of the weights, bfloat16 (default), float16 or float32")
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--recover_steps", type=int, default=0, help="LoRA steps before the export; 0 for none")
    parser.add_argument("--text", type=Path, help="the text that they learn from")
    # KEY=VALUE, as everywhere in this project; what begins with a dash is an option of argparse's own.
    options = parsed(parser, arguments)
    of_model = {key: value for key in _OF_MODELS if (value := getattr(options, key)) is not None}
    if options.run and of_model:
        parser.error("run says which model: leave model, granularity and dtype out")
    if (options.mask and options.scenario is not None) or not (options.run or options.mask):
        parser.error("expected mask=FILE, or run=FOLDER and scenario=N of its scenarios")
    if bool(options.recover_steps) != bool(options.text):
        parser.error("recover_steps and text belong together")
    try:
        if options.run:
            from experiments.recipes.recorded import recorded_model  # here, for only runs need Hydra

            llm, mask = recorded_model(options.run, options.scenario, options.mask)
        else:
            llm = load_llm(**of_model)
            mask = read_mask(llm, options.mask)
        recovery = options.text and Recovery(local_text(options.text), options.recover_steps)
        exported = export_pruned(llm, mask, options.format, options.out, recovery)
    except (RapError, OSError) as error:
        sys.exit(f"error: {error}")
    if exported.losses:
        print("recovery: loss on held-out text {:.4f} before, {:.4f} after".format(*exported.losses))
    print(f"export: {exported.folder} ({mask}); read again by {exported.reader}, and equal")


if __name__ == "__main__":
    main(sys.argv[1:])
