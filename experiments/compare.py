"""A sweep of its experiment's agents and seeds, and the report: `python -m experiments.compare experiment=policies`.

The same as `python train.py -m experiment=policies`; without an experiment it runs `family_quick`.
"""

import sys

import train


def main() -> None:
    named = any(argument.startswith("experiment=") for argument in sys.argv[1:])
    sys.argv[1:] = ["--multirun", *([] if named else ["experiment=family_quick"]), *sys.argv[1:]]
    train.main()


if __name__ == "__main__":
    main()
