"""The prompt, the scores, the loss, and a training run that may be stopped at any step."""

import warnings
from dataclasses import replace
from hashlib import sha256
from math import exp, log

import peft
import pytest
import torch

from experiments.records import read_record
from experiments.rerank_training import recipe
from experiments.rerank_training.lists import ListSettings, TrainingLists
from experiments.rerank_training.rivals import Bm25
from experiments.rerank_training.scoring import ListScorer
from experiments.rerank_training.teacher import TeacherWeights
from experiments.rerank_training.training import (
    Trainer,
    TrainingSettings,
    list_loss,
    load_adapter,
    save_adapter,
    with_adapter,
)
from rap_env.llm.loading import build_tiny_llm
from rap_env.rerank.prompts import SMOLLM2, Prompts
from scripts import train_reranker
from tests.experiments.rerank_training.conftest import shared_words

SETTINGS = TrainingSettings(
    steps=5,
    lists_per_step=2,
    learning_rate=0.01,
    rank=2,
    first_layer=0,
    max_document_tokens=12,
    first_document_tokens=6,
)


def trainer_of(collection, dtype="float32", settings=SETTINGS):
    llm = build_tiny_llm(dtype=dtype)
    adapted = with_adapter(llm, settings)
    texts = {name: document.text for name, document in collection.documents.items()}
    lists = TrainingLists(collection, ListSettings(documents=3, random_documents=1), Bm25(texts))
    return Trainer(llm, adapted, lists, settings), llm, adapted


def learned(adapted) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in adapted.named_parameters() if each.requires_grad}


def ignore_progress(done: int, total: int) -> None:
    pass


def prompts_of(tokenizer, max_document_tokens: int) -> Prompts:
    return Prompts(tokenizer, SMOLLM2, max_document_tokens, context_tokens=2048)


def test_scores_are_those_of_a_plain_pass_over_each_prompt():
    llm = build_tiny_llm()
    documents = ["a wing", "a much longer text about a nozzle", ""]
    prompts = prompts_of(llm.tokenizer, 20)
    prompt, expected = prompts.of("what lifts", documents), []
    for ending in prompt.endings:
        logits = llm.model(torch.tensor([[*prompt.prefix, *ending]])).logits[0, -1]
        expected.append((logits[prompts.yes] - logits[prompts.no]).item())
    scorer = ListScorer(llm.model, llm.tokenizer, SMOLLM2, 20)
    with torch.no_grad():
        assert scorer.scores("what lifts", documents).tolist() == pytest.approx(expected, abs=1e-5)


def test_likelihoods_are_those_of_the_query_s_tokens_in_a_plain_pass():
    llm = build_tiny_llm()  # one token for each byte
    documents = ["a wing", "a much longer text about a nozzle", ""]
    prompt, query = prompts_of(llm.tokenizer, 20).of("what lifts", documents), "what lifts"
    expected = []
    for ending in prompt.endings:
        tokens = [*prompt.prefix, *ending]
        start = llm.tokenizer.decode(tokens).index(query)  # its first byte is the token at this place
        places = range(start, start + len(query))
        assert llm.tokenizer.decode([tokens[place] for place in places]) == query
        logits = llm.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        expected.append(sum(logits[place - 1, tokens[place]].item() for place in places) / len(query))
    scorer = ListScorer(llm.model, llm.tokenizer, SMOLLM2, 20)
    assert scorer.likelihoods(query, documents).tolist() == pytest.approx(expected, abs=1e-4)
    assert scorer.rank(query, documents, by_likelihood=True) == pytest.approx(expected, abs=1e-4)


def test_ranking_in_batches_keeps_the_order_of_the_documents():
    llm = build_tiny_llm()
    documents = [f"{'word ' * (number * 7 % 13)}{number}" for number in range(23)]
    scorer = ListScorer(llm.model, llm.tokenizer, SMOLLM2, 40)
    with torch.no_grad():
        one_by_one = [scorer.scores("what", [document]).item() for document in documents]
    assert scorer.rank("what", documents) == pytest.approx(one_by_one, abs=1e-5)


def test_tokens_are_counted_without_padding_and_what_all_share_once():
    llm = build_tiny_llm()
    scorer = ListScorer(llm.model, llm.tokenizer, SMOLLM2, 20)
    scorer.rank("what", ["a", "longer"])
    prompt = prompts_of(llm.tokenizer, 20).of("what", ["a", "longer"])
    assert scorer.tokens == len(prompt.prefix) + sum(map(len, prompt.endings))


def test_likelihoods_that_count_nothing_are_not_computed(collection, tmp_path, monkeypatch):
    settings = replace(SETTINGS, steps=2, teacher=TeacherWeights(likelihood=0.0, bm25=2.0))
    expected, _llm, _adapted = trainer_of(collection, settings=replace(settings, teacher=TeacherWeights()))
    expected.train(tmp_path / "both.pt", minutes=5, every=100, progress=ignore_progress)
    monkeypatch.setattr(ListScorer, "likelihoods", None)
    trainer, _llm, _adapted = trainer_of(collection, settings=settings)
    assert trainer.train(tmp_path / "one.pt", minutes=5, every=100, progress=ignore_progress)
    assert trainer.tokens == expected.tokens / 2


def test_the_loss_is_how_far_the_softmax_is_from_what_is_wanted():
    scores = torch.tensor([2.0, 0.0, 1.0])
    assert list_loss(scores, scores.softmax(0)).item() == pytest.approx(0.0, abs=1e-6)
    total = exp(2) + 1 + exp(1)
    assert list_loss(scores, torch.tensor([1.0, 0.0, 0.0])).item() == pytest.approx(log(total) - 2)


def test_an_untrained_adapter_changes_nothing():
    plain, adapted = build_tiny_llm(), build_tiny_llm()
    with_adapter(adapted, SETTINGS)
    tokens = torch.arange(20)[None]
    assert torch.equal(plain.model(tokens).logits, adapted.model(tokens).logits)


def test_layers_before_the_first_have_no_matrices():
    adapted = with_adapter(build_tiny_llm(), TrainingSettings(first_layer=3))
    assert {name.split("layers.")[1][0] for name in learned(adapted)} == {"3"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stops", [[1], [2, 3]])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(collection, tmp_path, dtype, stops):
    whole, _llm, expected = trainer_of(collection, dtype)
    assert whole.train(tmp_path / "whole.pt", minutes=5, every=100, progress=ignore_progress)
    for stop in stops:
        part, _llm, _adapted = trainer_of(collection, dtype)

        def interrupt(done, total, stop=stop):
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            part.train(tmp_path / "parts.pt", minutes=5, every=1, progress=interrupt)
    last, _llm, adapted = trainer_of(collection, dtype)
    assert last.train(tmp_path / "parts.pt", minutes=5, every=1, progress=ignore_progress)
    assert (last.step, last.tokens, last.losses) == (whole.step, whole.tokens, whole.losses)
    assert learned(adapted).keys() == learned(expected).keys()
    for name, value in learned(expected).items():
        assert torch.equal(learned(adapted)[name], value), name


def test_documents_grow_and_the_learning_rate_rises_and_falls(collection):
    trainer, _llm, _adapted = trainer_of(collection, settings=replace(SETTINGS, steps=40, learning_rate=1.0))
    rates, cuts = [], []
    for trainer.step in range(40):
        rates.append(trainer._learning_rate())
        cuts.append(trainer._document_tokens())
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[20:22] == [1.0, 0.95] and rates[-1] == pytest.approx(0.05)
    assert (cuts[0], cuts[20], cuts[-1]) == (6, 9, 11)


def test_training_stops_when_its_time_is_up_and_goes_on_later(collection, tmp_path):
    trainer, _llm, _adapted = trainer_of(collection)
    assert not trainer.train(tmp_path / "c.pt", minutes=0, every=1, progress=ignore_progress)
    assert trainer.step == 0
    assert trainer.train(tmp_path / "c.pt", minutes=5, every=1, progress=ignore_progress)


def test_a_checkpoint_of_other_settings_is_refused(collection, tmp_path):
    trainer_of(collection)[0].train(tmp_path / "c.pt", minutes=0, every=1, progress=ignore_progress)
    other, _llm, _adapted = trainer_of(collection, settings=replace(SETTINGS, steps=6))
    with pytest.raises(ValueError, match=r"c\.pt is of other settings: .*'steps': 5"):
        other.train(tmp_path / "c.pt", minutes=0, every=1, progress=ignore_progress)


def test_the_loss_on_one_list_falls(collection, tmp_path):
    settings = replace(SETTINGS, steps=30, lists_per_step=1, learning_rate=0.02, rank=4, first_document_tokens=40)
    settings = replace(settings, max_document_tokens=40)
    trainer, _llm, _adapted = trainer_of(collection, settings=settings)
    trainer._lists = type("One", (), {"settings": trainer._lists.settings, "__getitem__": lambda self, _: one})()
    one = trainer_of(collection)[0]._lists[0]
    trainer.train(tmp_path / "c.pt", minutes=5, every=100, progress=ignore_progress)
    assert trainer.losses[-1] < 0.7 * trainer.losses[0]


def test_a_saved_adapter_computes_the_same_and_names_the_model_not_a_folder(collection, tmp_path):
    trainer, llm, adapted = trainer_of(collection)
    trainer.train(tmp_path / "c.pt", minutes=5, every=100, progress=ignore_progress)
    save_adapter(adapted, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert f'"base_model_name_or_path": "{llm.name}"' in (tmp_path / "adapter" / "adapter_config.json").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for what that calls by another name now
        loaded = peft.PeftModel.from_pretrained(build_tiny_llm().model, tmp_path / "adapter")
    tokens = torch.arange(20)[None]
    assert torch.allclose(loaded(tokens).logits, llm.model(tokens).logits, atol=1e-6)
    assert not torch.allclose(build_tiny_llm().model(tokens).logits, llm.model(tokens).logits, atol=1e-3)


def test_training_goes_on_from_a_saved_adapter(collection, tmp_path):
    trainer, llm, adapted = trainer_of(collection)
    trainer.train(tmp_path / "c.pt", minutes=5, every=100, progress=ignore_progress)
    save_adapter(adapted, tmp_path / "adapter")
    next_llm = build_tiny_llm()
    next_adapted = with_adapter(next_llm, SETTINGS)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert load_adapter(next_adapted, tmp_path / "adapter") == sha256(file.read_bytes()).hexdigest()
    assert {name: value.tolist() for name, value in learned(next_adapted).items()} == {
        name: value.tolist() for name, value in learned(adapted).items()
    }
    tokens = torch.arange(20)[None]
    assert torch.equal(next_llm.model(tokens).logits, llm.model(tokens).logits)


@pytest.mark.parametrize("other", [{"rank": 3}, {"first_layer": 1}])
def test_an_adapter_of_another_form_is_no_start(collection, tmp_path, other):
    save_adapter(with_adapter(build_tiny_llm(), SETTINGS), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: expected \d+ matrices of this rank"):
        load_adapter(with_adapter(build_tiny_llm(), replace(SETTINGS, **other)), tmp_path)


def test_the_script_trains_saves_and_records(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "encoder_scores", shared_words)
    monkeypatch.setattr(recipe, "load_llm", lambda _name, _dtype: build_tiny_llm())
    options = [f"data={folder}", f"out={tmp_path / 'out'}", f"record={tmp_path / 'record.json'}", "steps=2"]
    options += ["document_tokens=16", "first_layer=2", "candidates=5", "validation_queries=4", "report_queries=6"]
    with pytest.raises(SystemExit, match="the time is up"):
        train_reranker.main([*options, "minutes=0"])
    train_reranker.main(options)
    assert "bm25 + tuned" in capsys.readouterr().out
    record = read_record(tmp_path / "record.json")
    assert record["config"]["data"] == "toy" and str(tmp_path) not in str(record)
    assert len(record["results"]["systems"]["tuned"]["by_query"]) == 6
    assert record["results"]["training"]["steps"] == 2
    assert {"untuned", "likelihood"} <= record["results"]["systems"].keys()
    assert len(record["results"]["validation"]["tuned"]["by_query"]) == 4
    with pytest.raises(SystemExit, match="records are written once"):
        train_reranker.main(options)
    start = tmp_path / "out" / "adapter"
    options[1:3] = [f"out={tmp_path / 'next'}", f"record={tmp_path / 'next.json'}"]
    options += [f"start={start}", "likelihood=0", "bm25=1.5"]
    train_reranker.main([*options, "steps=0", "report=validation", "plain_model=no"])
    results = read_record(tmp_path / "next.json")["results"]
    assert results["systems"]["tuned"] == record["results"]["validation"]["tuned"], "the adapter that it starts with"
    assert not {"untuned", "likelihood"} & results["systems"].keys()
    training = read_record(tmp_path / "next.json")["config"]["training"]
    assert training["teacher"] == {"likelihood": 0.0, "bm25": 1.5, "encoder": 0.0, "first": 2.0}
    assert training["start_digest"] == sha256((start / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert record["config"]["training"]["start_digest"] == ""
