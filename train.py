"""Trains an agent to prune a language model: `python train.py agent=ppo model=llama2-7b`; see conf/config.yaml."""

import sys

import hydra
from omegaconf import DictConfig

from experiments.run import run
from rap_env.errors import RapError


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    try:
        run(config)
    except RapError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
