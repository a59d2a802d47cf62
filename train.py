"""Trains an agent to prune a language model: `python train.py agent=ppo model=llama2-7b`; see conf/config.yaml."""

import sys

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from experiments.run import run
from rap_env.errors import RapError


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    try:
        run(config)
    except RapError as error:
        sys.exit(f"error: {error}")
    except InstantiationException as error:  # Hydra's wrapping of whatever a constructor raised
        if isinstance(error.__cause__, RapError | ValueError):
            sys.exit(f"error: {error.__cause__}")
        raise


if __name__ == "__main__":
    main()
