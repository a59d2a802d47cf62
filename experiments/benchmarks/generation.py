"""Greedy tokens behind prompts, by a live model and by `generate` of transformers."""

from collections.abc import Sequence

import torch

from rap_env.llm.live import LiveModel
from rap_env.llm.switchable import SwitchableLLM


@torch.inference_mode()
def read_together(model: LiveModel, prompts: Sequence[Sequence[int]], n_new: int) -> list[list[int]]:
    """Greedy tokens behind each prompt, all sequences read in one stream."""
    caches = [model.new_cache(len(prompt) + n_new) for prompt in prompts]
    pieces, found = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    for _ in range(n_new):
        chosen = model.read(list(zip(caches, pieces, strict=True))).argmax(-1).tolist()
        pieces = [[token] for token in chosen]
        for own, token in zip(found, chosen, strict=True):
            own.append(token)
    return found


@torch.inference_mode()
def generated(llm: SwitchableLLM, prompts: Sequence[Sequence[int]], n_new: int) -> list[list[int]]:
    """Greedy tokens behind prompts of one length, in one batch, with the mask that is applied."""
    inputs = torch.tensor(prompts, device=llm.device)
    settings = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
    return llm.model.generate(inputs, **settings)[:, inputs.shape[1] :].tolist()
