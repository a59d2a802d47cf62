"""What the tests of the reranker share: requests, a tiny model in a folder of its own, and upstream's scores."""

import json

import torch

from rap_env.llm.loading import build_tiny_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.rerank.prompts import QWEN3, Prompts

QUERY = "what is alpha?"
DOCUMENTS = ["alpha beta", "", "x" * 900, "the yes", "no no no", "alpha beta", "{query} <end>", "\n\n tab\t"]
N_LAYERS = 6


def tiny(model_type: str = "llama", seed: int = 0) -> SwitchableLLM:
    return build_tiny_llm(model_type, n_layers=N_LAYERS, seed=seed)


@torch.inference_mode()
def upstream_scores(
    llm: SwitchableLLM, query: str, documents: list[str], max_document_tokens: int = 512
) -> list[float]:
    """logit(yes) - logit(no) of the model's own forward on each full prompt, one by one."""
    prompts = Prompts(llm.tokenizer, QWEN3, max_document_tokens, llm.shape.context_tokens)
    prompt, scores = prompts.of(query, documents), []
    for ending in prompt.endings:
        logits = llm.model(torch.tensor([[*prompt.prefix, *ending]])).logits[0, -1].float()
        scores.append(float(logits[prompts.yes] - logits[prompts.no]))
    return scores


def cranfield_like(n: int, n_words: int) -> list[str]:
    """Texts of different lengths, made by a rule."""
    words = json.loads('["wing", "flow", "heat", "shock", "layer", "plate", "jet", "speed", "theory", "drag", "lift"]')
    return [" ".join(words[(i * j + j // 3) % len(words)] for j in range(n_words - 3 * i)) for i in range(n)]
