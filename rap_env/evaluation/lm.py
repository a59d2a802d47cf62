"""The switchable LLM as lm-eval's model `rap`: everything but the scoring of log-likelihoods is lm-eval's own."""

import contextlib
import copy
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from rap_env.errors import EvaluationFailed, InvalidMask, UnknownName
from rap_env.evaluation.scoring import Pair, Score, ScoringPlan, fit_to_context
from rap_env.llm.loading import load_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from rap_env.reading import reading

# `load_llm`'s
_LOADING = ("dtype", "device", "revision", "trust_remote_code", "granularity", "weights", "kv_cache")
# HFLM's that concern text and generation. It swallows whatever else it is given, so a misspelt `mask` would be lost.
_TEXT = ("add_bos_token", "batch_size", "chat_template_args", "enable_thinking", "max_batch_size", "max_length")
_TEXT += ("prefix_token_id", "think_end_token", "truncation")
_ARGUMENTS = ("pretrained", "mask", "batch_tokens", *_LOADING, *_TEXT)


@register_model("rap")
class RapLM(HFLM):
    """lm-eval's HF adapter over a model of which components are dropped, with our scoring engine.

    Tokens, truncation, chat templates, rolling log-likelihoods and generation are the adapter's.

    Args:
        pretrained: A `SwitchableLLM`, or what `load_llm` takes: `smollm2-135m`, a folder, or a hub name.
        mask: JSON file that holds a pruning mask to apply (`PruningMask.to_json`); None leaves the model as it is.
        batch_tokens: Tokens that are forwarded at once when log-likelihoods are scored.
        **options: `dtype`, `device`, `revision`, `trust_remote_code`, `granularity`, `weights` and `kv_cache` of
            `load_llm`; and HFLM's `add_bos_token`, `prefix_token_id`, `max_length` and the like.

    Raises:
        UnknownName: There is no such argument, model or dtype.
        InvalidMask: The mask file is missing, or is of another model.
        EvaluationFailed: The tokenizer has neither BOS nor EOS, or `max_length` is beyond the model's context.
    """

    def __init__(
        self, pretrained: str | SwitchableLLM, mask: str | None = None, batch_tokens: int = 4096, **options
    ) -> None:
        for name in options:
            if name not in _ARGUMENTS:
                raise UnknownName("model argument", name, _ARGUMENTS)
        loading = {name: options.pop(name) for name in _LOADING if name in options}
        if loading.get("device") == "cuda:0":  # what lm-eval's command line says where no device was named
            loading["device"] = "auto"
        llm = pretrained if isinstance(pretrained, SwitchableLLM) else load_llm(pretrained, **loading)
        # Given a model, HFLM ties its weights again, which would overwrite a head that differs from the embedding;
        # so it gets a stand-in. The tokenizer is copied because it may be given a padding token.
        stand_in = SimpleNamespace(device=llm.device, config=llm.model.config)
        super().__init__(stand_in, backend="causal", tokenizer=copy.deepcopy(llm.tokenizer), **options)
        self.llm, self._model, self.batch_tokens = llm, llm.model, batch_tokens
        if self.prefix_token_id is None:
            raise EvaluationFailed(f"the tokenizer of {llm.name} has neither BOS nor EOS; lm-eval needs one of them")
        if self.max_length > llm.shape.context_tokens:  # as of windows and workloads; HFLM would run on, or crash
            raise EvaluationFailed(
                f"max_length={self.max_length} is beyond the model's context of {llm.shape.context_tokens}"
            )
        if mask is not None:
            path = Path(mask).expanduser()
            if not path.is_file():
                raise InvalidMask(f"expected a file that holds a pruning mask; there is no {path}")
            with reading(path, "a pruning mask of the model", InvalidMask):
                chosen = PruningMask.from_json(llm.shape, path.read_text(encoding="utf-8"))
            llm.apply(chosen)

    def pair(self, request: Instance, owner: str) -> Pair:
        """A request's tokens as lm-eval makes them, cut to what the model takes; the owner is what an error names.

        Raises:
            EvaluationFailed: The context or the continuation has no tokens, the continuation more than the model takes,
                or there is no encoding that the model can read.
        """
        encoder = copy.copy(self)
        encoder._loglikelihood_tokens = lambda requests, **_: requests  # hands the tokens out instead of scoring them
        with _naming(owner):
            ((_text, context, continuation),) = HFLM.loglikelihood(encoder, [request], disable_tqdm=True)
            self._check_known([*context, *continuation])
            return fit_to_context(context, continuation, self.max_length)

    def plan(self, pairs: Sequence[Pair]) -> ScoringPlan:
        """How pairs are forwarded."""
        return ScoringPlan(pairs, self.batch_tokens)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Scores requests under the mask that is applied; raises what `pair` raises, before anything is forwarded."""
        return self._score([self.pair(request, owner) for owner, request in _named(requests)])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts under the mask that is applied; refuses them before anything is forwarded."""
        for owner, request in _named(requests):
            with _naming(owner):
                self._check_known(self.tok_encode(*request.args))
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **_) -> list[Score]:
        """Scores windows of a rolling log-likelihood."""
        return self._score([fit_to_context(context, window, self.max_length) for _text, context, window in requests])

    def _check_known(self, tokens: Sequence[int]) -> None:
        if (last := max(tokens, default=0)) >= self.llm.shape.vocab_size:
            raise EvaluationFailed(f"it has token {last}; the model knows {self.llm.shape.vocab_size}: wrong tokenizer")

    def _score(self, pairs: Sequence[Pair]) -> list[Score]:
        return next(self.plan(pairs).run(self.llm, [self.llm.mask]))[1] if pairs else []


def _named(requests: Sequence[Instance]) -> Iterator[tuple[str, Instance]]:
    for number, request in enumerate(requests):
        yield f"request {number}, {reprlib.repr(request.args)}", request


@contextlib.contextmanager
def _naming(owner: str) -> Iterator[None]:
    """Says whose tokens can't be made or scored."""
    try:
        yield
    except IndexError as error:  # lm-eval looks at a continuation's first token where there is no context
        raise EvaluationFailed(f"{owner}: neither its context nor its continuation has tokens") from error
    except (TypeError, UnicodeError) as error:  # the tokenizer's, such as of half a surrogate pair
        raise EvaluationFailed(f"{owner}: the tokenizer can't encode it: {error}") from error
    except EvaluationFailed as error:
        raise EvaluationFailed(f"{owner}: {error}") from error
