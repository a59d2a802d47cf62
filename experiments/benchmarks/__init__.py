"""The parts of `python -m experiments.benchmark`: each measures a plain way and ours alternately in one run."""
