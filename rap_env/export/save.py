"""Exports a pruned model: writes it, loads it again, compares it with the masked model, and only then shows it."""

import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rap_env.errors import ExportRefused, InvalidMask, RapError, check_known
from rap_env.export import deci, gguf_file, hf
from rap_env.export.pruned import PrunedModel
from rap_env.export.recovery import Recovery, recovered
from rap_env.llm.shape import GRANULARITIES, ModelShape
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


@dataclass(frozen=True)
class Format:
    """What a format can't hold, how it is written into a folder, and how that is read again and compared."""

    refuse: Callable[[PrunedModel], None]
    write: Callable[[PrunedModel, Path], None]
    check: Callable[[PrunedModel, Path], str]


FORMATS = {
    "hf": Format(lambda pruned: None, hf.write, hf.check),
    "deci": Format(deci.refuse, deci.write, deci.check),
    "gguf": Format(gguf_file.refuse, gguf_file.write, gguf_file.check),
}


@dataclass(frozen=True)
class Exported:
    """An export that was read again and computes what the masked model does.

    Attributes:
        folder: Where it lies.
        reader: Who read it.
        losses: Of recovery, on held-out text before and after; None without it.
    """

    folder: Path
    reader: str
    losses: tuple[float, float] | None = None


def export_pruned(
    llm: SwitchableLLM, mask: PruningMask, format: str, folder: str | Path, recovery: Recovery | None = None
) -> Exported:
    """Writes the model without what a mask drops into a new folder.

    Args:
        llm: The model.
        mask: A mask over its components.
        format: `"hf"`, `"deci"` or `"gguf"`; docs/export.md says what each can hold.
        folder: Where it goes: not there yet, or empty.
        recovery: Text that the pruned model learns first; None leaves its weights as they are.

    Raises:
        UnknownName: There is no such format.
        InvalidMask: The mask belongs to another model, or to another granularity.
        ExportRefused: The folder holds something, the format can't hold the model, recovery did not help, or what was
            written does not compute what the masked model does, or it can't be written. Nothing stays behind then.
    """
    chosen = FORMATS[check_known("export format", format, FORMATS)]
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportRefused(f"expected a new or empty folder for the export; {folder} holds something: name another")
    pruned, losses = PrunedModel.of(llm, mask), None
    chosen.refuse(pruned)
    if recovery is not None:
        learned = recovered(pruned, recovery)
        pruned, losses = learned.model, (learned.loss_before, learned.loss_after)
    # The folder inside has the final name already: transformers names the modules of a checkpoint after it.
    draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        inner = draft / folder.name
        try:
            inner.mkdir(parents=True)
            chosen.write(pruned, inner)
        except RapError:
            raise
        except Exception as error:  # libraries raise anything where a disk is full
            raise ExportRefused(f"the export to {folder} can't be written, and nothing of it stays: {error}") from error
        reader = chosen.check(pruned, inner)
        inner.rename(folder)  # at once: nobody sees an export that is half written or was not checked
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Exported(folder, reader, losses)


def read_mask(llm: SwitchableLLM, path: str | Path) -> PruningMask:
    """Reads a file that holds what `PruningMask.to_json` wrote.

    Raises:
        InvalidMask: The file can't be read, is no mask, or one of another model or granularity.
    """
    try:
        text = Path(path).expanduser().read_text()
        return PruningMask.from_json(llm.shape, text)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidMask(f"expected a file with a pruning mask; can't read {path}: {error}") from error
    except RapError:
        if reason := _of_others(llm, text):
            raise InvalidMask(f"{path} holds a mask {reason}") from None
        raise


def _of_others(llm: SwitchableLLM, text: str) -> str | None:
    """How a mask that does not belong to a model would, if that were prepared or cut otherwise."""
    if "@" in text and not llm.preparation.order:
        return "over parts that a run has ordered; name the run: run=FOLDER"
    for granularity in GRANULARITIES:
        if _belongs(ModelShape.from_model(llm.model, granularity), text):
            if granularity == "group" and llm.preparation.order:
                return f"over parts in the order of the checkpoint; those of {llm.name} were ordered anew"
            return f"of granularity {granularity!r}; load the model with it: granularity={granularity}"
    return None


def _belongs(shape: ModelShape, text: str) -> bool:
    try:
        return bool(PruningMask.from_json(shape, text))
    except RapError:
        return False
