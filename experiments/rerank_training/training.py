"""Trains LoRA matrices on lists; a run that was stopped goes on where its last checkpoint was written."""

import contextlib
import hashlib
import io
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import nn

from experiments.rerank_training.lists import TrainingList, TrainingLists
from experiments.rerank_training.scoring import ListScorer
from experiments.rerank_training.teacher import Teacher, TeacherWeights
from rap_env.errors import RecordUnreadable
from rap_env.files import write_over
from rap_env.llm.switchable import SwitchableLLM
from rap_env.reading import reading
from rap_env.rerank.prompts import SMOLLM2
from rap_env.rng import isolated_rng

_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LARGEST_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class TrainingSettings:
    """How the adapter is learned.

    Attributes:
        steps: Steps of AdamW.
        lists_per_step: Lists that a step's gradient is the mean of.
        learning_rate: Reached over the first twentieth of the steps; it falls to 0 over the last half.
        rank: Of the LoRA matrices; they are added times 2.
        first_layer: Layers before it stay as they are, so that no gradient has to pass them.
        max_document_tokens: Where documents are cut at the end.
        first_document_tokens: Where they are cut at the start; in between it grows with the steps. Short documents cost
            little, and whether their words match a query is easy to see, so that the model soon learns to look for it.
        teacher: What a list's scores are to be.
        early_layers: After so many layers scores are to be those after the last one, so that who leaves early is known
            early.
        early_weight: Of each of them in the loss, where the last layer has 1.
        seed: Of the LoRA matrices at the start.
        start_digest: SHA-256 of the adapter file that they were taken from instead; empty where they were drawn.
    """

    steps: int = 400
    lists_per_step: int = 2
    learning_rate: float = 5e-4
    rank: int = 16
    first_layer: int = 10
    max_document_tokens: int = 128
    first_document_tokens: int = 32
    teacher: TeacherWeights = field(default_factory=TeacherWeights)
    early_layers: tuple[int, ...] = ()
    early_weight: float = 0.0
    seed: int = 0
    start_digest: str = ""


def list_loss(scores: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence from the shares that are wanted [N] to the softmax of the scores [N]."""
    return nn.functional.kl_div(torch.log_softmax(scores, 0), shares, reduction="sum")


def with_adapter(llm: SwitchableLLM, settings: TrainingSettings) -> nn.Module:
    """Puts untrained LoRA matrices, in the model's own type, into its layers; the model computes what it did."""
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=2 * settings.rank,
        target_modules=list(_MATRICES),
        layers_to_transform=list(range(settings.first_layer, llm.model.config.num_hidden_layers)),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings(), isolated_rng(settings.seed):
        warnings.simplefilter("ignore", FutureWarning)  # it asks transformers for what that calls by another name now
        adapted = peft.get_peft_model(llm.model, config, autocast_adapter_dtype=False)
    adapted.peft_config["default"].base_model_name_or_path = llm.name  # else the folder that it was loaded from
    return adapted


def load_adapter(adapted: nn.Module, folder: Path) -> str:
    """Puts the matrices of a saved adapter in place of those that were drawn; returns the SHA-256 of its file.

    Layers that it has nothing for stay as they are.

    Raises:
        ValueError: It has matrices that are not among these, or of another rank.
    """
    path = folder / "adapter_model.safetensors"
    saved, own = load_file(path), peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    shapes, expected = ({name: tuple(each.shape) for name, each in group.items()} for group in (saved, own))
    if not shapes.items() <= expected.items():
        raise ValueError(f"{path}: expected {len(expected)} matrices of this rank and these layers; it has others")
    peft.set_peft_model_state_dict(adapted, own | saved)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_adapter(adapted: nn.Module, folder: Path) -> None:
    """Writes `adapter_model.safetensors` and `adapter_config.json`, as `peft` reads them."""
    adapted.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a form with nothing filled in


@contextlib.contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention as single operations: on a CPU, the gradient of torch's fused one takes three times as long."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


class Trainer:
    """Trains the matrices of an adapter.

    The model may compute in bfloat16: what is learned is kept in float32 beside it, for steps this small would
    vanish, and rounded to the model's type after each step.

    Args:
        llm: The model, with an adapter in its layers.
        adapted: What `with_adapter` returned.
        lists: What is learned from.
        settings: How; the ones that the adapter was made with.

    Attributes:
        step: Steps done.
        seconds: That they took, in earlier runs too.
        tokens: That were read, likewise; each document of a list is read twice.
        losses: Mean loss of each step.
    """

    def __init__(
        self, llm: SwitchableLLM, adapted: nn.Module, lists: TrainingLists, settings: TrainingSettings
    ) -> None:
        self._model, self._lists, self._settings, self._adapted = llm.model, lists, settings, adapted
        self._learned = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
        self._exact = [each.detach().float().clone() for each in self._learned.values()]
        self._optimizer = torch.optim.AdamW(self._exact, weight_decay=0.0)
        self._teacher = Teacher(settings.teacher, lists.bm25)
        self._scorer = ListScorer(llm.model, llm.tokenizer, SMOLLM2, settings.max_document_tokens)
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.losses: list[float] = []

    def train(self, checkpoint: Path, minutes: float, every: int, progress: Callable[[int, int], None]) -> bool:
        """Goes on from the checkpoint, if it is there, until all steps are done or the time is up.

        Args:
            checkpoint: Written after every so many steps, and at the end.
            minutes: That this call may take; one step more is not begun.
            every: Steps between checkpoints.
            progress: Called with (steps done, all steps).

        Returns:
            Whether all steps are done.

        Raises:
            ValueError: The checkpoint is of other settings.
        """
        if checkpoint.exists():
            self._load(checkpoint)
        started, before = time.monotonic(), self.seconds
        progress(self.step, self._settings.steps)
        with _plain_attention(self._model):
            while self.step < self._settings.steps and time.monotonic() - started < 60 * minutes:
                self._take_step()
                self.seconds = before + time.monotonic() - started
                progress(self.step, self._settings.steps)
                if self.step % every == 0:
                    self._save(checkpoint)
        self._save(checkpoint)
        return self.step == self._settings.steps

    def _take_step(self) -> None:
        n_lists, total, tokens = self._settings.lists_per_step, 0.0, self._scorer.tokens
        self._scorer.max_document_tokens = self._document_tokens()
        for number in range(self.step * n_lists, (self.step + 1) * n_lists):
            each = self._lists[number]
            loss = self._loss(each) / n_lists
            loss.backward()
            total += loss.item()
        for exact, learned in zip(self._exact, self._learned.values(), strict=True):
            exact.grad = learned.grad.float()
            learned.grad = None
        nn.utils.clip_grad_norm_(self._exact, _LARGEST_GRADIENT_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.step()
        self._round()
        self.step += 1
        self.tokens += self._scorer.tokens - tokens
        self.losses.append(total)

    def _loss(self, each: TrainingList) -> torch.Tensor:
        settings = self._settings
        wanted = self._teacher.shares(each.query, each.texts, self._likelihoods(each))
        n_layers = [*settings.early_layers, self._adapted.config.num_hidden_layers]
        *early, last = self._scorer.layer_scores(each.query, each.texts, n_layers)
        own = last.detach().softmax(0)
        return list_loss(last, wanted) + settings.early_weight * sum(list_loss(scores, own) for scores in early)

    def _likelihoods(self, each: TrainingList) -> list[float]:
        """By the model without what is learned; zeros where they count nothing."""
        if not self._settings.teacher.likelihood:
            return [0.0] * len(each.texts)
        with self._adapted.disable_adapter():
            return self._scorer.likelihoods(each.query, each.texts).tolist()

    def _learning_rate(self) -> float:
        steps = self._settings.steps
        share = min((self.step + 1) / max(1, steps // 20), 2 * (steps - self.step) / steps)
        return self._settings.learning_rate * min(1.0, share)

    def _document_tokens(self) -> int:
        first, last = self._settings.first_document_tokens, self._settings.max_document_tokens
        return first + (last - first) * self.step // self._settings.steps

    @torch.no_grad()
    def _round(self) -> None:
        for exact, learned in zip(self._exact, self._learned.values(), strict=True):
            learned.copy_(exact)

    def _identity(self) -> dict:
        return {"training": asdict(self._settings), "lists": asdict(self._lists.settings)}

    def _save(self, checkpoint: Path) -> None:
        state = {
            "settings": self._identity(),
            "exact": dict(zip(self._learned, self._exact, strict=True)),
            "optimizer": self._optimizer.state_dict(),
            "done": {"step": self.step, "seconds": self.seconds, "tokens": self.tokens, "losses": self.losses},
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_over(checkpoint, buffer.getvalue())

    @torch.no_grad()
    def _load(self, checkpoint: Path) -> None:
        with reading(checkpoint, "a checkpoint of this training", RecordUnreadable):
            state = torch.load(checkpoint, weights_only=True)
            if state["settings"] != self._identity():
                raise ValueError(f"{checkpoint} is of other settings: {state['settings']}; name another folder")
            for exact, name in zip(self._exact, self._learned, strict=True):
                exact.copy_(state["exact"][name])
            self._optimizer.load_state_dict(state["optimizer"])
            done = {name: state["done"][name] for name in ("step", "seconds", "tokens", "losses")}
        self._round()
        for name, value in done.items():
            setattr(self, name, value)
