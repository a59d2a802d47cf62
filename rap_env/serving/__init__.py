"""A live model whose memory is taken away and given back."""

from rap_env.serving.controller import Controller, Decision, Limits
from rap_env.serving.engine import Engine, Options, Step
from rap_env.serving.readings import RecordedMemory, free_bytes
from rap_env.serving.request import Request, Sequence, Status

__all__ = [
    "Controller",
    "Decision",
    "Engine",
    "Limits",
    "Options",
    "RecordedMemory",
    "Request",
    "Sequence",
    "Status",
    "Step",
    "free_bytes",
]
