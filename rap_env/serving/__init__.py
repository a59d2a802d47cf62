"""A live model whose memory is taken away and given back."""

from rap_env.serving.controller import Controller, Decision, Limits
from rap_env.serving.readings import RecordedMemory, free_bytes

__all__ = ["Controller", "Decision", "Limits", "RecordedMemory", "free_bytes"]
