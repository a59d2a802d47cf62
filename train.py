"""Lets an agent search a language model's masks: `python train.py agent=ppo model=llama2-7b`."""

import hydra
from omegaconf import DictConfig

from experiments.recipes.refusals import refusing_in_one_line
from experiments.recipes.run import run


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    with refusing_in_one_line():
        return run(config)


if __name__ == "__main__":
    main()
