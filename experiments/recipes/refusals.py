"""What users can mend is refused in one line, without a traceback."""

import contextlib
import sys
from collections.abc import Iterator

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode

from rap_env.errors import RapError


@contextlib.contextmanager
def refusing_in_one_line() -> Iterator[None]:
    """Ends the program with one line; a job of a sweep is only marked as failed, so that those after it run.

    Raises:
        RapError: In a sweep. Hydra ends it with the first error of its jobs when all have run.
    """
    try:
        yield
    except (RapError, InstantiationException) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if not isinstance(cause, RapError | ValueError):
            raise
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            sys.exit(f"error: {cause}")
        print(f"error: {cause}", file=sys.stderr, flush=True)
        raise cause.with_traceback(None) from None
