"""Exports a pruned model: `python -m scripts.export mask=mask.json format=hf out=FOLDER`.

Options are KEY=VALUE. docs/export.md says what each format can hold.
"""

import argparse
import sys
from pathlib import Path

from rap_env.errors import RapError
from rap_env.export.recovery import Recovery
from rap_env.export.save import FORMATS, export_pruned, read_mask
from rap_env.llm.embedded import EMBEDDED_NAME
from rap_env.llm.loading import load_llm


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EMBEDDED_NAME, help="embedded name, local folder or hub name")
    parser.add_argument("--mask", type=Path, required=True, help="a file that PruningMask.to_json wrote")
    parser.add_argument("--granularity", default="block", help="of the mask: block or group")
    parser.add_argument("--format", choices=sorted(FORMATS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights: bfloat16, float16 or float32")
    parser.add_argument("--recover_steps", type=int, default=0, help="LoRA steps before the export; 0 for none")
    parser.add_argument("--text", type=Path, help="the text that they learn from")
    # KEY=VALUE, as everywhere in this project; what begins with a dash is an option of argparse's own.
    options = parser.parse_args([given if given.startswith("-") else f"--{given}" for given in arguments])
    if bool(options.recover_steps) != bool(options.text):
        parser.error("recover_steps and text belong together")
    try:
        llm = load_llm(options.model, dtype=options.dtype, granularity=options.granularity)
        mask = read_mask(llm, options.mask)
        recovery = options.text and Recovery(options.text.read_text(encoding="utf-8"), options.recover_steps)
        exported = export_pruned(llm, mask, options.format, options.out, recovery)
    except (RapError, OSError) as error:
        sys.exit(f"error: {error}")
    if exported.losses:
        print("recovery: loss on held-out text {:.4f} before, {:.4f} after".format(*exported.losses))
    print(f"export: {exported.folder} ({mask}); read again by {exported.reader}, and equal")


if __name__ == "__main__":
    main(sys.argv[1:])
