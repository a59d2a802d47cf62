"""Recipes: build from config, run, record, report."""

import os

# OpenMP's threads spin at barriers by default; with any other process on the cores a forward then takes 2 to 10 times
# as long. It must be said before torch starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
