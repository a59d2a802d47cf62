"""Live serving, measured: a model's process under a memory limit that moves and is enforced."""
