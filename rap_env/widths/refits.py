"""Output matrices of all widths, on disk: only those in use take memory."""

from pathlib import Path

import torch
from safetensors import safe_open

from rap_env.components import Site
from rap_env.errors import CompensationFailed
from rap_env.reading import reading
from rap_env.widths.compensation import Refit


def file_of(folder: Path, site: Site) -> Path:
    """The file of a site."""
    return folder / f"{site.name}.safetensors"


def named(refit: Refit, n_parts: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A refit as its file holds it.

    Args:
        refit: For `n_parts` kept parts.
        n_parts: How many are kept.
        dtype: Of the model's weights.
    """
    tensors = {"weight": refit[0], "bias": refit[1]}
    return {f"{name}.{n_parts}": t.to(dtype).contiguous() for name, t in tensors.items() if t is not None}


class Refits:
    """Reads the refits of one model.

    Args:
        folder: Has a file for each site.
        digest: Names what they were made from.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self._folder, self.digest = folder, digest

    def of(self, site: Site) -> Refit:
        """The output matrix of a site with some of its parts [H, K], and its bias.

        Raises:
            CompensationFailed: What the site keeps are not its first parts, or the file is damaged.
        """
        n_parts = len(site.parts)
        if site.parts != tuple(range(n_parts)):
            raise CompensationFailed(
                f"refits are for masks that keep the first parts of each site; {site} keeps others"
            )
        path = file_of(self._folder, site)
        with reading(path, "a site's refits; remove its folder to have them measured again", CompensationFailed):
            with safe_open(path, "pt") as file:
                bias = file.get_tensor(f"bias.{n_parts}") if f"bias.{n_parts}" in file.keys() else None  # noqa: SIM118
                weight = file.get_tensor(f"weight.{n_parts}")
            if not weight.isfinite().all() or (bias is not None and bias.shape != weight.shape[:1]):
                raise ValueError(f"expected finite weights, and a bias for each row; got {list(weight.shape)}")
            return weight, bias
