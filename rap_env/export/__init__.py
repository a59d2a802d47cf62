"""Pruned models as files that other programs load: transformers checkpoints, DeciLM checkpoints and GGUF files."""
