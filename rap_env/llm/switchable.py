"""A causal LM whose components can be switched off and on again, without a trace."""

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from rap_env.components import ATTENTION, KINDS, Site
from rap_env.errors import InvalidMask
from rap_env.llm.architecture import DecoderLayer, architecture_of, decoder_layers, run_steps, submodule
from rap_env.llm.digest import weights_digest
from rap_env.llm.formats import WeightFormats, quantise
from rap_env.llm.kernels import product, read_heads_in_place
from rap_env.llm.lanes import in_lanes
from rap_env.llm.packing import Packing, TokenTree
from rap_env.llm.placement import refuse_spread
from rap_env.llm.prepared import Preparation, Refits, Residency
from rap_env.llm.shape import ModelShape
from rap_env.llm.streams import cut_stream, join_streams, parting
from rap_env.llm.tokenizer import tokenizer_digest
from rap_env.llm.widened import mm
from rap_env.mask import PruningMask, kept_sites


class _StreamCaptured(Exception):
    """Carries the first layer's inputs out of upstream's forward: hidden states and context."""


class SwitchableLLM:
    """A transformers causal LM that runs with any subset of its components.

    A dropped site is skipped together with its norm, so it costs no compute; the attentions that stay are
    renumbered, so that the KV cache holds them only and transformers still finds the past length in its layer 0.
    Threads may generate, open streams and run them at once; a mask that is applied holds for what all of them generate.

    Shapes: B sequences, T tokens, H hidden size, V vocabulary.

    Args:
        model: The causal LM; its weights are never changed.
        tokenizer: The tokenizer that belongs to it.
        name: What reports call the model.
        granularity: What is a component; see `ModelShape.from_model`.

    Attributes:
        store: Keeps some components' weights in memory and the others on disk; None while all are in memory.
        refits: Stand in for the output matrices of sites that keep some of their parts; None for none.
        preparation: What the order of the parts rests on.
        site_executions: Sites that `run` and `run_masks` have run so far.

    Raises:
        UnknownName: The architecture table does not know the model's family, or there is no such granularity.
        UnsupportedArchitecture: The layers are not alike, or not pre-norm.
    """

    def __init__(self, model: nn.Module, tokenizer, name: str, granularity: str = "block") -> None:
        self.model = read_heads_in_place(model.eval().requires_grad_(False))
        self.tokenizer, self.name = tokenizer, name
        self.shape = ModelShape.from_model(model, granularity)
        self.mask, self.site_executions = PruningMask.all_kept(self.shape), 0
        self.store: Residency | None = None
        self.refits: Refits | None = None
        self.preparation = Preparation()
        self._granularity, self._architecture = granularity, architecture_of(model.config)
        self._layers = decoder_layers(model)
        self._use_cache: list[bool | None] | None = None  # upstream's settings while no attention is kept
        self._narrowed: dict[Site, DecoderLayer] = {}  # of the mask that is applied

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def resident(self) -> PruningMask:
        """The components whose weights are in memory."""
        return PruningMask.all_kept(self.shape) if self.store is None else self.store.resident

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over config, KV format and the weights' names, types and bytes, hexadecimal: what is computed."""
        return weights_digest(self.model, "" if self.refits is None else self.refits.digest)

    @functools.cached_property
    def tokenizer_digest(self) -> str:
        """SHA-256 over everything that turns text into tokens, hexadecimal."""
        return tokenizer_digest(self.tokenizer)

    def quantise(self, weights: WeightFormats = "full", kv_cache: str = "full") -> None:
        """Turns weights, or the KV cache, into other number formats; takes, and refuses, what `quantise` does."""
        self.weights_changed()  # brings back what a store released
        quantise(self.model, weights, kv_cache)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Has to be called after weights or refits were changed: what is known of them is forgotten, a store too."""
        if self.store is not None:
            self.store.close()
        self.store = None
        self.__dict__.pop("digest", None)
        self._layers, self._narrowed = decoder_layers(self.model), {}
        self.shape = ModelShape.from_model(self.model, self._granularity, self.preparation.order)
        self.apply(PruningMask.all_kept(self.shape))

    def parameters_of(self, site: Site) -> list[nn.Parameter]:
        """The weights that belong to one site; its norm is fixed."""
        modules = self._layers[site.layer].modules_of(site.kind)
        return [parameter for module in modules for parameter in module.parameters()]

    def apply(self, mask: PruningMask) -> None:
        """Makes the model run with the mask's components only, until the next call; raises what `check` raises."""
        self.check(mask)
        steps: list[list[tuple[DecoderLayer, Site]]] = [[] for _ in self._layers]
        for site in kept_sites(mask):
            steps[site.layer].append((self.layer_of(site), site))  # all of them first: one may be refused
        kept_attentions = 0
        for layer, own in zip(self._layers, steps, strict=True):
            for attention in (one.module.self_attn for one in (layer, *(step for step, _site in own))):
                attention.__dict__["layer_idx"] = kept_attentions  # quicker than torch's own way, as switches need
            if len(own) < len(KINDS) or any(site.parts for _step, site in own):
                run = functools.partial(run_steps, [(step, site.kind) for step, site in own])
                layer.module.forward = run  # at once: another thread runs the layer as it was or as it is to be
            else:
                layer.module.__dict__.pop("forward", None)
            kept_attentions += any(site.kind == ATTENTION for _step, site in own)
        self._allow_cache(kept_attentions > 0)
        self._narrowed = {site: step for own in steps for step, site in own if site.parts is not None}
        self.mask = mask

    def check(self, mask: PruningMask) -> None:
        """Refuses another model's masks, and those that keep what is not in memory.

        Raises:
            InvalidMask: The mask's components are not this model's.
            WeightsReleased: The model's store has released what the mask keeps.
        """
        if mask.components != self.shape.components:
            raise InvalidMask(
                f"expected a mask over the {len(self.shape.components)} components of {self.name};"
                f" got one over {len(mask.components)} others: other names, or other bytes (dtype, number format)"
            )
        if self.store is not None:
            self.store.check(mask)

    def _allow_cache(self, allowed: bool) -> None:
        """Without any attention there is no cache, hence no past length to continue from: decode without one."""
        configs = (self.model.config, self.model.generation_config)
        if not allowed and self._use_cache is None:
            self._use_cache = [config.use_cache for config in configs]
            for config in configs:
                config.use_cache = False
        elif allowed and self._use_cache is not None:
            for config, value in zip(configs, self._use_cache, strict=True):
                config.use_cache = value
            self._use_cache = None

    def layer_of(self, site: Site) -> DecoderLayer:
        """The layer that runs a site, with the weights of the site's parts only; its other site is whole."""
        if self.store is not None:
            self.store.check_site(site)
        layer = self._layers[site.layer]
        if site.parts is None or site in self._narrowed:
            return self._narrowed.get(site, layer)
        refit = None if self.refits is None else self.refits.of(site)
        if self.store is not None:
            return self.store.narrowed(layer, site, refit)
        return layer.narrowed(site.kind, site.parts, refit)

    @contextlib.contextmanager
    def pruned(self, mask: PruningMask) -> Iterator["SwitchableLLM"]:
        """Runs the body with a mask, then puts the previous one back, also when the body raises."""
        previous = self.mask
        try:
            self.apply(mask)
            yield self
        finally:
            self.apply(previous)

    def open_stream(self, input_ids: torch.Tensor, **inputs) -> tuple[torch.Tensor, dict]:
        """Embeds tokens and stops in front of layer 0.

        Args:
            input_ids: Tokens [B, T].
            **inputs: Upstream's further arguments, such as `attention_mask` or `position_ids`.

        Returns:
            The residual stream [B, T, H] and the context that `run` needs with it.
        """
        first, caller = self._layers[0].module, threading.get_ident()

        # `kwargs` may be left out: a thread that comes between the two steps in which torch adds or removes a hook with
        # keyword arguments calls it without them.
        def capture(module, args, kwargs=None):
            if threading.get_ident() != caller:
                return  # another thread generates meanwhile
            raise _StreamCaptured(args[0] if args else kwargs.pop("hidden_states"), kwargs)

        handle = first.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            submodule(self.model, self._architecture.decoder)(input_ids=input_ids, use_cache=False, **inputs)
        except _StreamCaptured as stream:
            return stream.args
        finally:
            handle.remove()
        raise AssertionError("upstream's forward did not reach its first layer")

    def open_packed(self, trees: Sequence[TokenTree] | Packing) -> tuple[torch.Tensor, dict, Packing]:
        """Embeds token trees, packed into one stream of N tokens without padding.

        Args:
            trees: What to forward, in order of length; or packed already.

        Returns:
            The residual stream [1, N, H], the context that `run` needs with it, and where each tree starts.
        """
        refuse_spread(self.name, [layer.device for layer in self._layers])
        packing = trees if isinstance(trees, Packing) else Packing(trees, self.device, self.shape.attention_window)
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)  # stops upstream from building one [N, N]
        positions = packing.positions[None]
        hidden, context = self.open_stream(packing.tokens[None], position_ids=positions, attention_mask=mask)
        return hidden, context | {"attention_mask": packing}, packing

    def run(self, sites: Iterable[Site], hidden: torch.Tensor, context: dict) -> torch.Tensor:
        """Runs sites over the residual stream, [B, T, H] -> [B, T, H], whatever mask is applied."""
        sites = tuple(sites)
        self.site_executions += len(sites)
        if not sites:
            return hidden
        steps = [(self.layer_of(site), site.kind) for site in sites]

        def run_part(part: tuple[torch.Tensor, dict]) -> torch.Tensor:
            stream, own_context = part
            return run_steps(steps, stream, **own_context)

        return join_streams(in_lanes(run_part, cut_stream(hidden, context)), context).to(hidden.device)

    def run_masks(
        self,
        masks: Iterable[PruningMask],
        hidden: torch.Tensor,
        context: dict,
        held=None,
    ) -> Iterator[tuple[PruningMask, torch.Tensor]]:
        """Runs several masks over one stream; what masks have in common in front is run once.

        Goes down the trie over the kept parts of each site. Where masks part, the stream is held for the larger group
        while the smaller one is run, so at most log2(number of masks) streams are held. Each result is exactly that of
        running its mask alone.

        Args:
            masks: Distinct masks over this model's components.
            hidden: The residual stream [B, T, H] in front of the first site.
            context: What `open_stream` or `open_packed` returned with it.
            held: `HeldStreams` of one mask from earlier calls; each mask starts where it parts from that one.

        Raises:
            InvalidMask: A mask's components are not this model's.

        Yields:
            Each mask with the residual stream after its last site, as soon as it is known.
        """
        masks = list(masks)
        for mask in masks:
            self.check(mask)
        waiting = [(0, hidden, masks)] if masks else []
        if held is not None:
            waiting = [(*held.in_front_of_parting(mask), [mask]) for mask in masks]
        while waiting:
            position, hidden, group = waiting.pop()
            end = parting(group, position)
            hidden = self.run(kept_sites(group[0], position, end), hidden, context)
            if end == len(group[0].kept_parts):
                for mask in group:
                    yield mask, hidden
                continue
            parts: dict[tuple[bool, ...], list[PruningMask]] = {}
            for mask in group:
                parts.setdefault(mask.kept_parts[end][1], []).append(mask)
            # The smallest group runs first: so at most log2 of all wait.
            waiting += [(end, hidden, part) for part in sorted(parts.values(), key=len, reverse=True)]

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The norm in front of the head, [..., H] -> [..., H]."""
        decoder = submodule(self.model, self._architecture.decoder)
        return submodule(decoder, self._architecture.final_norm)(hidden)

    def head(self, normed: torch.Tensor, words: slice, out: torch.Tensor) -> torch.Tensor:
        """Logits of a range of the vocabulary, [N, H] -> [N, words] in the model's dtype, written to `out`."""
        head = self.model.lm_head
        return mm(normed, head.weight[words] if isinstance(head, nn.Linear) else head.matrix(words).t(), out)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head, [..., H] -> [..., V] in the model's dtype."""
        return product(self.model.lm_head, self.final_norm(hidden))
