"""Embedded tasks: 660 short multiple-choice items, generated here, for evaluation without any download.

Each subject is an lm-eval task `rap_<subject>_search` (tag `rap_search`), which searches may score candidates with, and
a task `rap_<subject>_report` (tag `rap_report`), which final results are measured on. The halves ask about different
facts. Each choice is one token for SmolLM2, so a half costs 330 forwards of 5.5 tokens on average.

| subject | items of each half | choices | example |
|---|---|---|---|
| agreement | 50 | 2 | The key near the doors: is, are |
| reflexives | 42 | 3 | The queens praised: themselves, himself, herself |
| capitals | 67 | 4 | The capital of France is: Paris, Athens, Denver, Madrid |
| elements | 52 | 4 | The chemical symbol for gold is: Ge, Cu, Au, Mn |
| opposites | 52 | 4 | The opposite of up is: pessimistic, down, dry, dangerous |
| properties | 67 | 4 | You can use a ladder to: weigh, climb, write, bake |

Beside them, with tags of their own (`rap_recall_search`, `rap_recall_report`): recall over long contexts
(`rap_env/evaluation/tasks/recall.py`), 64 items of 4 choices at each of about 128, 256, 512, 1024 and 2048 tokens.
"""

from pathlib import Path

TASKS_FOLDER = Path(__file__).parent
