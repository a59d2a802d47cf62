"""Enters an agent's runs into a leaderboard."""

from collections.abc import Sequence
from pathlib import Path

from experiments.collect import write_table
from experiments.leaderboard.checks import check, rebuild
from experiments.leaderboard.rows import Tuning, check_rows, entries, name_of, records_of
from experiments.records import read_records
from rap_env.errors import InvalidConfig

_SHOWN = 3  # faults


def enter(records: Path, agent: str, table: Path, tuning: Tuning, overrides: Sequence[str] = ()) -> list[str]:
    """Makes a row of each token budget of an agent, checks them as `make validate` does, and appends them.

    Args:
        records: A table of records, or a sweep's folder.
        agent: One of its agents.
        table: The leaderboard; it is made if missing, and stays as it was if anything is refused.
        tuning: What the agent's settings were chosen on.
        overrides: `KEY=VALUE` for the records' config, as a rule where the texts lie now.

    Returns:
        What was entered, in lines.

    Raises:
        InvalidConfig: The rows may not stand there: of another family, not of one clean commit, contexts that were
            searched on, masks over their budgets, entered already, or losses that are measured differently.
        ContaminationFound: The text that was searched on shares 13 words in a row with what is reported on.
        RapError: Whatever else `rebuild` and `check` refuse.
    """
    chosen = records_of(read_records(records), agent)
    board = read_records(table) if table.exists() else []
    rebuilt = rebuild(chosen[0], overrides, records)
    if rebuilt.changes:
        raise InvalidConfig(f"the model is not what it was in {records}; changed since: {rebuilt.changes}")
    rows = entries(chosen, rebuilt.llm.shape, rebuilt.windows, tuning)
    check_rows([*board, *rows])
    checked = check(rows, rebuilt)
    if checked.faults:
        more = [f"and {len(checked.faults) - _SHOWN} more"] if len(checked.faults) > _SHOWN else []
        raise InvalidConfig("; ".join([*checked.faults[:_SHOWN], *more]))
    write_table(table, [*board, *rows], mixed=True)
    return [f"entered: {name_of(row)}, {len(row['results']['seeds'])} seeds" for row in rows]
