"""Rerankers compared, each in a process of its own: what `python -m experiments.rerank` runs."""
