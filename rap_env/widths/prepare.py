"""Makes a model's widths ready: parts in order, and for each width an output matrix that makes up for the rest."""

import functools
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from rap_env.components import ATTENTION, Site
from rap_env.errors import CompensationFailed, InvalidMask, UnsupportedArchitecture, check_known
from rap_env.evaluation.identity import engine_identity
from rap_env.evaluation.perplexity import tokens_digest
from rap_env.files import write_over
from rap_env.llm.embedded import cache_folder
from rap_env.llm.parts import add_bias
from rap_env.llm.prepared import Preparation
from rap_env.llm.switchable import SwitchableLLM
from rap_env.reading import reading
from rap_env.widths.compensation import COMPENSATIONS, best_ridge
from rap_env.widths.elimination import OBS, elimination_order
from rap_env.widths.order import SCORES, input_places, order_of, reorder
from rap_env.widths.refits import Refits, file_of, named
from rap_env.widths.statistics import InputStatistics, input_statistics, merged

NONE = "none"
_DESCRIPTION = "parts.json"
_HELD_OUT = 4  # one window of so many is held out where a ridge is chosen
_AGAIN = "remove its folder to have it measured again"
_VERSION = 2  # of what is written, and of how it is computed


@dataclass(frozen=True)
class WidthRecipe:
    """How parts are ordered, and what makes up for those that are dropped.

    Attributes:
        score: `"wanda"`, `"flap"` or `"2ssp"` (`rap_env.widths.order`), or `"obs"` (`rap_env.widths.elimination`).
        compensation: `"none"`, `"bias"`, `"ridge"` or `"procrustes"`; see `rap_env.widths.compensation`.
        ridge: Strength of `"ridge"` in mean diagonal entries; None chooses it for each site on a quarter of the text.

    Raises:
        UnknownName: No such score or compensation.
        CompensationFailed: A negative ridge, or a ridge for another compensation.
    """

    score: str = "wanda"
    compensation: str = NONE
    ridge: float | None = None

    def __post_init__(self) -> None:
        check_known("score of parts", self.score, [*SCORES, OBS])
        check_known("compensation", self.compensation, [NONE, *COMPENSATIONS])
        if self.ridge is not None and (self.compensation != "ridge" or not self.ridge >= 0.0):
            raise CompensationFailed(
                f"expected a ridge of at least 0 with compensation 'ridge'; got {self.ridge} with {self.compensation!r}"
            )
        if self.ridge is not None:
            object.__setattr__(self, "ridge", float(self.ridge))  # 1 and 1.0 are one recipe, which is measured once

    @property
    def chooses_ridge(self) -> bool:
        return self.compensation == "ridge" and self.ridge is None

    @property
    def needs_gram(self) -> bool:
        return self.score == OBS or self.compensation in ("ridge", "procrustes")


def prepare_widths(llm: SwitchableLLM, windows: torch.Tensor, recipe: WidthRecipe | None = None) -> None:
    """Orders the parts of every site by a score, and fits the output matrices of all widths.

    Widths are nested then: what a mask keeps of a site are views of the first rows and columns of its matrices. The
    dense model stays the same function but for rounding. What was measured is kept in the cache folder: the orders and,
    with compensation, a matrix for each site and width, of which only those in use take memory.

    Args:
        llm: A model with the granularity `"group"`; its weights change their places, and its digest changes.
        windows: Calibration tokens [N, T]; a search that uses the model pays for them.
        recipe: How; by default in the order of the score `"wanda"`, without compensation.

    Raises:
        InvalidMask: The components are whole sites.
        UnsupportedArchitecture: The weights are quantised already.
        InvalidWorkload: Nothing can be measured on the windows.
        CompensationFailed: A system is singular, there are too few windows to choose a ridge on, or what was kept is
            damaged; the model is as it was then.
    """
    recipe = recipe or WidthRecipe()
    if not llm.shape.has_parts:
        raise InvalidMask("expected a model of the granularity 'group'; whole sites have no parts to order")
    if not all(type(llm.layer_of(site).output(site.kind)) is nn.Linear for site in llm.shape.sites):
        raise UnsupportedArchitecture("expected weights as they were loaded for widths: quantise them afterwards")
    if recipe.chooses_ridge and len(windows) < _HELD_OUT:
        raise CompensationFailed(f"expected at least {_HELD_OUT} windows to choose a ridge on; got {len(windows)}")
    identity = engine_identity(llm) | {"windows": tokens_digest(windows), "recipe": vars(recipe), "version": _VERSION}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "widths" / digest[:32]
    if not (folder / _DESCRIPTION).is_file():
        if recipe.compensation != NONE:
            _check_room(llm)
        _measure(llm, windows, recipe, folder)
    seconds, scores, order_of_site = _measured(llm, folder)
    orders = hashlib.sha256()
    for site, order in order_of_site.items():
        reorder(llm.layer_of(site), site.kind, order)
        orders.update(order.numpy().tobytes())
        if recipe.compensation == "bias":
            add_bias(llm.layer_of(site).output(site.kind))
    llm.refits = None if recipe.compensation == NONE else Refits(folder, digest)
    prepared = Preparation(orders.hexdigest()[:6], windows.numel(), seconds)
    llm.preparation = prepared
    llm.weights_changed()
    names = [component.name for component in llm.shape.components]
    of_parts = {rule: dict(zip(names, values, strict=True)) for rule, values in scores.items()}
    llm.preparation = replace(prepared, scores=of_parts)


def _measured(llm: SwitchableLLM, folder: Path) -> tuple[float, dict[str, list[float]], dict[Site, torch.Tensor]]:
    """The seconds that measuring took, the scores of all parts by rule, and the order of what each site has.

    All of it is read and checked before the model is changed.
    """
    path, orders = folder / _DESCRIPTION, {}
    with reading(path, f"a model's widths; {_AGAIN}", CompensationFailed):
        description = json.loads(path.read_text(encoding="utf-8"))
        scores = {rule: [float(value) for value in of.values()] for rule, of in description["scores"].items()}
        if any(len(values) != len(llm.shape.components) for values in scores.values()):
            raise ValueError("expected a score of each part")
        seconds = float(description["seconds"])
    for site, own in llm.shape.components.sites:
        path = file_of(folder, site)
        n = own.stop - own.start if site.kind == ATTENTION else llm.layer_of(site).output(site.kind).in_features
        with reading(path, f"the order of a site's parts; {_AGAIN}", CompensationFailed):
            with safe_open(path, "pt") as file:
                orders[site] = file.get_tensor("order")
            if sorted(orders[site].tolist()) != list(range(n)):
                raise ValueError(f"expected each of {n} places once")
    return seconds, scores, orders


def _check_room(llm: SwitchableLLM) -> None:
    """Refuses refits that the disk does not hold, before the text is read."""
    needed = 0
    for site in llm.shape.sites:
        output, slices = llm.layer_of(site).output(site.kind), llm.layer_of(site).output_slices(site.kind)
        needed += sum(own.stop for own in slices[:-1]) * output.out_features * output.weight.element_size()
    cache = cache_folder().absolute()
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed > free:
        raise CompensationFailed(
            f"output matrices of all widths take {needed:,} bytes; {cache} ($RAP_CACHE) has {free:,} left"
        )


def _measure(llm: SwitchableLLM, windows: torch.Tensor, recipe: WidthRecipe, folder: Path) -> None:
    """Writes a file for each site, and at the end the description of all."""
    started, scores = time.perf_counter(), {}
    for site, statistics, halves in _statistics(llm, windows, recipe):
        layer = llm.layer_of(site)
        output = layer.output(site.kind)
        weight = output.weight
        of_channels = {name: rule(statistics, weight.float()) for name, rule in SCORES.items()}
        if recipe.score == OBS:
            order, of_channels[OBS] = elimination_order(layer, site.kind, weight, statistics.gram)
        else:
            order = order_of(layer, site.kind, of_channels[recipe.score])
        places, slices = input_places(layer, site.kind, order), layer.output_slices(site.kind)
        names = [component.name for component in llm.shape.components if component.site == site]
        for name, values in of_channels.items():
            of_parts = {part: values[places][own].sum().item() for part, own in zip(names, slices, strict=True)}
            scores.setdefault(name, {}).update(of_parts)
        tensors = {"order": order}
        if recipe.compensation != NONE:
            ordered, fit = weight.double()[:, places], COMPENSATIONS[recipe.compensation]
            if recipe.compensation == "ridge":
                chosen = recipe.ridge
                if halves:
                    chosen = best_ridge(ordered, *(half.reordered(places) for half in halves))
                fit = functools.partial(fit, ridge=chosen)
            refits = fit(ordered, statistics.reordered(places), [own.stop for own in slices[:-1]])
            for n_parts, (refit, bias) in enumerate(refits, 1):
                if bias is not None and output.bias is not None:
                    bias = bias + output.bias.double()  # it stands in for the layer's own
                tensors |= named((refit, bias), n_parts, weight.dtype)
        write_over(file_of(folder, site), save(tensors))
    description = {"seconds": time.perf_counter() - started, "scores": scores}
    write_over(folder / _DESCRIPTION, json.dumps(description))


def _statistics(
    llm: SwitchableLLM, windows: torch.Tensor, recipe: WidthRecipe
) -> Iterator[tuple[Site, InputStatistics, tuple[InputStatistics, InputStatistics] | None]]:
    """Of all windows; and where a ridge is chosen, of what it is fitted to and of what is held out."""
    if not recipe.chooses_ridge:
        yield from ((site, statistics, None) for site, statistics in input_statistics(llm, windows, recipe.needs_gram))
        return
    n_held_out = len(windows) // _HELD_OUT
    parts = windows[:-n_held_out], windows[-n_held_out:]
    for (site, fitted), (_, held_out) in zip(*(input_statistics(llm, part, gram=True) for part in parts), strict=True):
        yield site, merged(fitted, held_out), (fitted, held_out)
