"""Recipes: what one Hydra job does, from its config to its record."""
