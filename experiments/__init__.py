"""Recipes: build from config, run, record, report."""

import os

# Both must be said before torch starts OpenMP's threads. They spin at barriers by default; with any other process on
# the cores a forward then takes 2 to 10 times as long. And their number is by default that of the machine's cores,
# also where a container or taskset allows only some of them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if hasattr(os, "sched_getaffinity"):  # Linux only
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
