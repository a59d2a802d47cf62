"""Trains an agent to prune a language model: `python train.py agent=ppo model=llama2-7b`; see conf/config.yaml."""

import hydra
from omegaconf import DictConfig

from experiments.build import refusing_in_one_line
from experiments.run import run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    with refusing_in_one_line():
        run(config)


if __name__ == "__main__":
    main()
