"""Samples the text that ships with the package: `python -m scripts.sample_text rap_env/calibration/text`.

The same command gives other text on another machine or with other library versions: the shipped files are what counts.
Whoever replaces them reads all documents first (`UNFIT = ()` and more wanted), and lists those that should not be
shipped: about religions, peoples, violence or real people, with addresses, recited, or no language at all.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

from rap_env import load_llm
from rap_env.calibration import find_overlaps
from rap_env.evaluation.harness import HarnessEvaluator
from rap_env.rng import isolated_rng

SEED, DOCUMENTS, TOKENS = 0, 48, 300
UNFIT = ()
WANTED = {"calibration": 8, "evaluation": 12}  # files of so many documents
# SmolLM2-135M, 60 single removals on 4 x 256 tokens, one seed: rank correlation with the loss increases on WikiText is
# 0.87 for text sampled at 0.95, 0.85 at 1, 0.81 at 0.9 (and 0.94 to 0.96 between WikiText samples). At 1 the text
# drifts into noise: its loss is 3.6, where 0.95 gives 2.6 and WikiText 3.2 to 3.8.
TOP_P = 0.95


def sample(llm) -> list[str]:
    """Documents that continue the token that every text begins with, without any special token."""
    first = torch.full((DOCUMENTS, 1), llm.tokenizer.bos_token_id, device=llm.device)
    with isolated_rng(SEED):
        sampled = llm.model.generate(
            input_ids=first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            top_p=TOP_P,
            top_k=0,  # transformers would cut to 50 tokens
            max_new_tokens=TOKENS,
            suppress_tokens=sorted(llm.tokenizer.added_tokens_decoder),
            pad_token_id=0,  # silences a warning; nothing is padded, because no document can end early
        )
    return llm.tokenizer.batch_decode(sampled, skip_special_tokens=True)


def main(folder: Path) -> None:
    """Writes the first documents that are fit, or says which of them overlap."""
    sampled = sample(load_llm(device="cpu"))
    fit = iter([document for number, document in enumerate(sampled) if number not in UNFIT])
    texts = {name: list(itertools.islice(fit, wanted)) for name, wanted in WANTED.items()}
    items = HarnessEvaluator(["rap_search", "rap_report"]).item_texts
    overlaps = find_overlaps(texts["calibration"], items | {"evaluation": texts["evaluation"]})
    overlaps += find_overlaps(texts["evaluation"], items)
    overlaps += find_overlaps(texts["evaluation"][0::2], {"odd documents": texts["evaluation"][1::2]})
    print("overlaps:", *overlaps or ["none"], sep="\n")
    for name, documents in texts.items():
        lines = [json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
