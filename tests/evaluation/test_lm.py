"""lm-eval's model `rap`: our scoring inside lm-eval's own HF adapter, equal to it in everything else too."""

import copy

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from tokenizers.processors import TemplateProcessing

from rap_env.errors import EvaluationFailed, InvalidMask, UnknownName
from rap_env.evaluation.lm import RapLM
from rap_env.evaluation.tasks import TASKS_FOLDER
from rap_env.llm.loading import build_random_llm
from rap_env.llm.switchable import SwitchableLLM
from rap_env.mask import PruningMask
from tests.evaluation.lm_eval_cases import METRIC, YAML, by_lm_eval, hf, log_likelihoods, write_rows, write_task

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 257}
SIZES |= {"intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}
OPT_SIZES = SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 16}
ROWS = [
    {"question": "The sky is", "choices": ["blue", "red red"], "gold": 0},
    {"question": "", "choices": ["A fish swims.", "A fish flies."], "gold": 0},  # lm-eval puts BOS in front
    {"question": "Two and two is ", "choices": ["four", "five", "twenty-two"], "gold": 2},
]
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}[assistant] "


def assert_equal_to_hf(llm, tasks, folder, **options):
    expected, expected_responses = by_lm_eval(hf(llm), tasks, folder, **options)
    metrics, responses = by_lm_eval(RapLM(llm), tasks, folder, **options)
    assert metrics == expected
    for task in tasks:
        found = log_likelihoods(responses[task])
        assert found == pytest.approx(log_likelihoods(expected_responses[task]), abs=1e-4)
        assert [r[1] for r in responses[task]] == [r[1] for r in expected_responses[task]]
    return responses


def request(*arguments, kind="loglikelihood"):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def with_tokenizer(llm, **changes) -> SwitchableLLM:
    """The same model with a changed copy of its tokenizer."""
    tokenizer = copy.deepcopy(llm.tokenizer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return SwitchableLLM(llm.model, tokenizer, "changed")


@pytest.mark.parametrize("dropped", [(), ("layer0.attention", "layer2.mlp")], ids=["dense", "pruned"])
def test_scores_equal_those_of_lm_evals_own_adapter(tiny_llm, tmp_path, dropped):
    write_task(tmp_path, "toy", ROWS)
    with tiny_llm.pruned(PruningMask.all_kept(tiny_llm.shape).drop(*dropped)):
        assert_equal_to_hf(tiny_llm, ["toy"], tmp_path)


@pytest.mark.llm
@pytest.mark.parametrize("dropped", [(), ("layer0.attention", "layer20.mlp")], ids=["dense", "pruned"])
def test_scores_of_the_embedded_model_equal_those_of_lm_evals_own_adapter(embedded_llm_float32, dropped):
    llm = embedded_llm_float32
    with llm.pruned(PruningMask.all_kept(llm.shape).drop(*dropped)):
        assert_equal_to_hf(llm, ["rap_properties_report", "rap_reflexives_search"], TASKS_FOLDER, limit=8)


def test_contexts_longer_than_the_models_are_cut_from_the_left(tmp_path):
    llm = build_random_llm("llama", SIZES | {"max_position_embeddings": 64})
    question = ("abcdefg hij." * 20)[:199]
    lengths = (60, 62, 63, 64, 199)  # with a continuation of 4 or 11 tokens some fit and some do not
    rows = [{"question": question[:n], "choices": ["yes", "nope it is"], "gold": 1} for n in lengths]
    responses = assert_equal_to_hf(llm, ["toy"], write_task(tmp_path, "toy", rows))
    # By hand: the model reads the last 64 tokens of what stands in front of the last one.
    tokens = llm.tokenizer.encode(question + " nope it is")[-65:]
    with torch.inference_mode():
        logprobs = llm.model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
    expected = sum(logprobs[row, token].item() for row, token in enumerate(tokens[1:]) if row >= 64 - 11)
    assert log_likelihoods(responses["toy"])[-1] == pytest.approx(expected, abs=1e-4)


def test_a_prompt_that_brings_its_own_bos_gets_no_second_one(tiny_llm, tmp_path):
    llm = with_tokenizer(tiny_llm)
    llm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", pair="<end> $A $B", special_tokens=[("<end>", 256)]
    )
    assert llm.tokenizer.encode("a") == [256, *tiny_llm.tokenizer.encode("a")]
    rows = [row | {"question": start + row["question"]} for start in ("<end>", "") for row in ROWS]
    responses = assert_equal_to_hf(llm, ["toy"], write_task(tmp_path, "toy", rows))
    found = log_likelihoods(responses["toy"])
    assert found[:2] == pytest.approx(found[7:9], abs=1e-4), "one BOS with and without one in the prompt"


def test_chat_templates_work(tiny_llm, tmp_path):
    write_task(tmp_path, "toy", ROWS)
    llm = with_tokenizer(tiny_llm, chat_template=TEMPLATE)
    chat = assert_equal_to_hf(llm, ["toy"], tmp_path, apply_chat_template=True)
    assert chat != by_lm_eval(RapLM(llm), ["toy"], tmp_path)[1]


def test_rolling_log_likelihoods_work_also_beyond_the_models_context(tmp_path):
    llm = build_random_llm("llama", SIZES | {"max_position_embeddings": 64})
    write_rows(tmp_path, "text", [{"page": "A short page."}, {"page": "the quick brown fox jumps over it. " * 9}])
    text = YAML.format(name="text", output_type="loglikelihood_rolling", folder=tmp_path, delimiter="")
    text += METRIC.format("word_perplexity", "weighted_perplexity").replace("true", "false")
    (tmp_path / "text.yaml").write_text(f"{text}doc_to_text: ''\ndoc_to_target: page\n")
    with llm.pruned(PruningMask.all_kept(llm.shape).drop("layer0.mlp")):
        expected, ours = (by_lm_eval(lm, ["text"], tmp_path) for lm in (hf(llm), RapLM(llm)))
    assert [float(r) for r in ours[1]["text"]] == pytest.approx([float(r) for r in expected[1]["text"]], rel=1e-5)
    assert ours[0]["text"]["word_perplexity"] == pytest.approx(expected[0]["text"]["word_perplexity"], rel=1e-4)


def test_generation_works_under_the_mask_that_is_applied(tiny_llm, tmp_path):
    write_rows(tmp_path, "free", [{"question": "The sky is", "answer": "x"}, {"question": "Snow", "answer": "y"}])
    text = YAML.format(name="free", output_type="generate_until", folder=tmp_path, delimiter=" ")
    text += METRIC.format("exact_match", "mean") + "generation_kwargs: {until: ['.'], max_gen_toks: 8}\n"
    (tmp_path / "free.yaml").write_text(f"{text}doc_to_text: question\ndoc_to_target: answer\n")
    dense = PruningMask.all_kept(tiny_llm.shape)
    written = []
    for mask in (dense, dense.drop("layer0.attention", "layer1.mlp")):
        with tiny_llm.pruned(mask):
            ours = by_lm_eval(RapLM(tiny_llm), ["free"], tmp_path)
            assert ours == by_lm_eval(hf(tiny_llm), ["free"], tmp_path)
        written.append(ours[1]["free"])
    assert written[0] != written[1]


def test_a_context_without_tokens_is_refused_rather_than_read_from_a_neighbour(tiny_llm):
    lm = RapLM(tiny_llm)  # its tokenizer puts no BOS in front of anything
    with pytest.raises(EvaluationFailed, match="its context has no tokens"):
        lm.loglikelihood([request("The sky is", " blue"), request(" ", " blue")])
    with pytest.raises(EvaluationFailed, match="its continuation has no tokens"):
        lm.loglikelihood([request("The sky is", "")])
    assert lm.loglikelihood([]) == []


def test_a_continuation_longer_than_the_model_takes_is_refused():
    lm = RapLM(build_random_llm("llama", SIZES | {"max_position_embeddings": 16}))
    assert len(lm.loglikelihood([request("ab", "c" * 16)])) == 1
    with pytest.raises(EvaluationFailed, match="its continuation has 17 tokens; the model takes at most 16"):
        lm.loglikelihood([request("ab", "c" * 17)])


def test_a_length_beyond_the_models_context_is_refused():
    llm = build_random_llm("opt", OPT_SIZES)
    assert RapLM(llm, max_length=16).max_length == 16
    with pytest.raises(EvaluationFailed, match="max_length=17 is beyond the model's context of 16"):
        RapLM(llm, max_length=17)


def test_the_model_and_its_tokenizer_are_left_as_they_were(tiny_llm):
    untied = build_random_llm("llama", SIZES | {"tie_word_embeddings": True})
    untied.model.lm_head.weight = torch.nn.Parameter(torch.randn(257, 32), requires_grad=False)
    head = untied.model.lm_head.weight.clone()
    RapLM(untied)
    assert torch.equal(untied.model.lm_head.weight, head), "HFLM would tie it to the embedding"
    llm = with_tokenizer(tiny_llm, pad_token=None)
    assert RapLM(llm).tokenizer.pad_token == "<end>"
    assert llm.tokenizer.pad_token is None


def test_a_tokenizer_with_neither_bos_nor_eos_is_refused(tiny_llm):
    llm = with_tokenizer(tiny_llm, bos_token=None, eos_token=None)
    with pytest.raises(EvaluationFailed, match="tokenizer of changed has neither BOS nor EOS"):
        RapLM(llm)


def test_lm_eval_knows_the_model_by_its_name_and_applies_the_mask_of_a_file(tmp_path):
    lm = get_model("rap").create_from_arg_string("pretrained=tiny,dtype=float32,batch_tokens=64", {"device": "cuda:0"})
    assert isinstance(lm, RapLM)
    assert (lm.batch_tokens, lm.llm.dtype) == (64, torch.float32)
    assert lm.llm.mask == PruningMask.all_kept(lm.llm.shape)
    mask = lm.llm.mask.drop("layer1.mlp", "layer3.attention")
    (tmp_path / "mask.json").write_text(mask.to_json())
    pruned = get_model("rap").create_from_arg_string(f"pretrained=tiny,dtype=float32,mask={tmp_path}/mask.json")
    assert pruned.llm.mask == mask
    asked = [request("The sky is", " blue")]
    with lm.llm.pruned(mask):
        assert pruned.loglikelihood(asked) == lm.loglikelihood(asked)
    assert pruned.loglikelihood(asked) != lm.loglikelihood(asked)


def test_what_the_model_does_not_know_is_refused(tiny_llm, tmp_path):
    with pytest.raises(UnknownName, match="unknown model argument 'maks'; did you mean mask"):
        RapLM("tiny", maks="mask.json")
    with pytest.raises(InvalidMask, match=f"there is no {tmp_path}/none.json"):
        RapLM(tiny_llm, mask=f"{tmp_path}/none.json")
    (tmp_path / "other.json").write_text('{"n_components": 3, "dropped": []}')
    with pytest.raises(InvalidMask, match="got 3"):
        RapLM(tiny_llm, mask=f"{tmp_path}/other.json")
