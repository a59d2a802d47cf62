"""lm-eval's command line with our model `rap`, for versions of lm-eval that look for no plug-ins.

python -m rap_env.lm_eval --model rap --model_args pretrained=smollm2-135m,mask=mask.json --tasks piqa
"""

import sys

from lm_eval.__main__ import cli_evaluate

from rap_env.errors import RapError
from rap_env.evaluation.lm import RapLM  # noqa: F401 - registers itself


def main() -> None:
    """What the command `lm_eval` does; our own errors end it with one line."""
    try:
        cli_evaluate()
    except RapError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
