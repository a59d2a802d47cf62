"""Saves the W&B workspace of a project: `python -m scripts.wandb_workspace ENTITY rap`.

It needs a server, and a key for it in WANDB_API_KEY: `pip install -e ".[wandb]"`. Runs come there by tracker=wandb.
"""

import argparse
import os
import sys

from experiments.workspace import workspace


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.wandb_workspace", description=__doc__.splitlines()[0])
    parser.add_argument("entity", help="the user or team that the project belongs to")
    parser.add_argument("project", help="as tracker.project names it")
    options = parser.parse_args(arguments)
    if not os.environ.get("WANDB_API_KEY"):
        sys.exit("error: a workspace lies on a W&B server: set WANDB_API_KEY, and WANDB_BASE_URL for one of your own")
    try:
        print(f"workspace: {workspace(options.entity, options.project).save().url}")
    except Exception as error:  # wandb raises errors of many libraries for a server that can't be reached or refuses
        sys.exit(f"error: the workspace can't be saved: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
