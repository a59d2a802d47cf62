"""Exports a pruned model: writes it, loads it again, compares it with the masked model, and only then shows it."""

import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rap_env.errors import ExportRefused, check_known
from rap_env.export import deci, gguf_file, hf
from rap_env.export.pruned import PrunedModel
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask


@dataclass(frozen=True)
class Format:
    """How a format is written into a folder, and how what was written there is read again and compared."""

    write: Callable[[PrunedModel, Path], None]
    check: Callable[[PrunedModel, Path], str]


FORMATS = {
    "hf": Format(hf.write, hf.check),
    "deci": Format(deci.write, deci.check),
    "gguf": Format(gguf_file.write, gguf_file.check),
}


@dataclass(frozen=True)
class Exported:
    """An export that was read again and computes what the masked model does.

    Attributes:
        folder: Where it lies.
        reader: Who read it.
    """

    folder: Path
    reader: str


def export_pruned(llm: SwitchableLLM, mask: PruningMask, format: str, folder: str | Path) -> Exported:
    """Writes the model without what a mask drops into a new folder.

    Args:
        llm: The model.
        mask: A mask over its components.
        format: `"hf"`, `"deci"` or `"gguf"`; docs/export.md says what each can hold.
        folder: Where it goes: not there yet, or empty.

    Raises:
        UnknownName: There is no such format.
        InvalidMask: The mask belongs to another model, or to another granularity.
        ExportRefused: The folder holds something, the format can't hold the model, or what was written does not compute
            what the masked model does. Nothing stays behind then.
    """
    check_known("export format", format, FORMATS)
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportRefused(f"expected a new or empty folder for the export; {folder} holds something: name another")
    pruned = PrunedModel.of(llm, mask)
    # The folder inside has the final name already: transformers names the modules of a checkpoint after it.
    draft = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        inner = draft / folder.name
        inner.mkdir(parents=True)
        FORMATS[format].write(pruned, inner)
        reader = FORMATS[format].check(pruned, inner)
        inner.rename(folder)  # at once: nobody sees an export that is half written or was not checked
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Exported(folder, reader)
