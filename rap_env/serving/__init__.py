"""A live model whose memory is taken away and given back."""

from rap_env.serving.controller import Controller, Decision, Limits
from rap_env.serving.engine import Engine, Options, Step
from rap_env.serving.readings import BudgetFile, RealMemory, RecordedMemory, free_bytes
from rap_env.serving.request import Request, Sequence, Status
from rap_env.serving.service import Service

__all__ = [
    "BudgetFile",
    "Controller",
    "Decision",
    "Engine",
    "Limits",
    "Options",
    "RealMemory",
    "RecordedMemory",
    "Request",
    "Sequence",
    "Service",
    "Status",
    "Step",
    "free_bytes",
]
