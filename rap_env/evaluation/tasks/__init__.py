"""Embedded tasks."""

from pathlib import Path

TASKS_FOLDER = Path(__file__).parent
