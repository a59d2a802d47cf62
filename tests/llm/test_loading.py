"""Models load from safe files only, in the type and on the device asked for, or say what to do about it."""

import json
import shutil

import httpx2
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from rap_env.errors import ModelUnavailable, UnknownName
from rap_env.llm import loading
from rap_env.llm.loading import build_tiny_llm, load_llm

HUB_NAME = "rap-env-tests/no-such-model"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tiny Llama as `save_pretrained` writes it; leave it as it is."""
    folder = tmp_path_factory.mktemp("saved")
    llm = build_tiny_llm()
    llm.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model that a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def hub(monkeypatch):
    """Makes the hub answer with an error, or call the given function; returns the switch."""

    def answer(error: Exception | None = None) -> None:
        def model_info(*_args, **_kwargs):
            if error is not None:
                raise error

        monkeypatch.setattr(HfApi, "model_info", model_info)

    return answer


def http_error(kind: type[Exception], status: int, text: str = "") -> Exception:
    request = httpx2.Request("GET", f"https://huggingface.co/api/models/{HUB_NAME}")
    return kind(text, response=httpx2.Response(status, request=request))


def edit_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "name", ["smollm2", "tinny", "/no/such/folder", "/nonexistent", "./nonexistent", "~/nothing", "a/b c"]
)
def test_a_name_that_can_be_nothing_is_refused_without_asking_the_hub(name, hub):
    hub(AssertionError("asked the hub"))
    with pytest.raises(UnknownName, match="unknown model or folder") as refusal:
        load_llm(name)
    assert repr(name) in str(refusal.value)


def test_a_misspelt_embedded_name_is_recognised():
    with pytest.raises(UnknownName, match=r"unknown model or folder 'smolm2-135m'; did you mean smollm2-135m\?"):
        load_llm("smolm2-135m")


def test_an_unknown_type_is_refused():
    with pytest.raises(UnknownName, match=r"unknown dtype 'float23'; did you mean float32"):
        load_llm("tiny", dtype="float23")


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(
        ModelUnavailable, match=r"expected model\.safetensors, .* or exactly one \*\.gguf; found nothing"
    ):
        load_llm(str(tmp_path))


def test_pickled_weights_are_refused_with_advice(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelUnavailable, match=r"found .*pytorch_model\.bin.*convert them to safetensors first"):
        load_llm(str(folder))


def test_two_ggufs_are_refused(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelUnavailable, match=r"exactly one \*\.gguf; found a\.gguf, b\.gguf"):
        load_llm(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "Unrecognized model"),
        (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
        (lambda f: edit_config(f, model_type="unheard_of"), "does not recognize this architecture"),
        (lambda f: (f / "config.json").write_text("[]"), "Unrecognized model"),
        (lambda f: edit_config(f, num_attention_heads=3), "its config is not valid: .*not a multiple of the number of"),
        (lambda f: edit_config(f, hidden_size="wide"), "its config is not valid: .*hidden_size"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        (lambda f: (f / "model.safetensors").write_bytes(b"garbage" * 9), "header too large"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "header too small"),
    ],
    ids=[
        "no config",
        "broken config",
        "unknown family",
        "a list",
        "three heads",
        "a word",
        "no tokenizer",
        "garbage weights",
        "empty weights",
    ],
)
def test_a_damaged_folder_is_refused_with_its_name_and_the_reason(folder, damage, message):
    damage(folder)
    with pytest.raises(ModelUnavailable, match=f"can't load '{folder}': .*{message}"):
        load_llm(str(folder))


def test_weights_that_are_cut_off_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelUnavailable, match=r"can't load .*incomplete metadata"):
        load_llm(str(folder))


def test_an_unsupported_family_is_refused(tmp_path, saved):
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=1, n_embd=8, vocab_size=257)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved / name, tmp_path)
    with pytest.raises(
        UnknownName, match=r"unknown model architecture 'gpt2'; known: llama, mistral, opt, qwen2, qwen3$"
    ):
        load_llm(str(tmp_path))


@pytest.mark.parametrize(
    "error", [httpx2.ConnectError("no route"), httpx2.ReadTimeout("slow"), OSError("no name server")]
)
def test_without_a_network_a_hub_name_is_refused_at_once(hub, error):
    hub(error)
    with pytest.raises(
        ModelUnavailable, match=f"can't load '{HUB_NAME}': the hub can't be reached and the model is not"
    ):
        load_llm(HUB_NAME)


def test_a_gated_repository_says_where_to_ask_for_access(hub, monkeypatch):
    advice = f"the model is gated: ask for access at https://huggingface.co/{HUB_NAME}, then run `hf auth login`"
    hub(http_error(GatedRepoError, 403))
    with pytest.raises(ModelUnavailable, match=advice):
        load_llm(HUB_NAME)

    def download(*_args, **_kwargs):  # the hub describes gated models to everyone and refuses their files
        try:
            raise http_error(GatedRepoError, 403)
        except GatedRepoError as gated:
            raise OSError("You are trying to access a gated repo.") from gated

    hub(None)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", download)
    with pytest.raises(ModelUnavailable, match=advice):
        load_llm(HUB_NAME)


def test_a_missing_repository_says_to_check_the_name(hub):
    hub(http_error(RepositoryNotFoundError, 404))
    with pytest.raises(ModelUnavailable, match="no such model on the hub, or a private one: check the name"):
        load_llm(HUB_NAME)


def test_a_missing_revision_is_not_blamed_on_the_network(hub):
    hub(http_error(RevisionNotFoundError, 404))
    with pytest.raises(ModelUnavailable, match="the repository has no such revision"):
        load_llm(HUB_NAME, revision="v9")


def test_a_repository_without_safetensors_is_refused_with_advice(hub, monkeypatch):
    def download(*_args, **_kwargs):
        raise OSError(f"{HUB_NAME} does not appear to have a file named model.safetensors")

    hub(None)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", download)
    with pytest.raises(ModelUnavailable, match="no safetensors weights; pickled ones are not loaded"):
        load_llm(HUB_NAME)


def test_a_model_in_the_hubs_cache_is_loaded_without_asking_the_hub(hub, monkeypatch):
    hub(AssertionError("asked the hub"))
    monkeypatch.setattr(loading, "try_to_load_from_cache", lambda *_args, **_kwargs: "/cache/config.json")

    def reached(*_args, **_kwargs):
        raise OSError("reached the loader")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", reached)
    with pytest.raises(ModelUnavailable, match="reached the loader"):
        load_llm(HUB_NAME)


def test_an_error_of_any_kind_names_the_model_and_stays_chained(folder, monkeypatch):
    def broken(*_args, **_kwargs):
        raise AttributeError("no such thing")

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", broken)
    with pytest.raises(ModelUnavailable, match=r"can't load .*model': AttributeError: no such thing") as error:
        load_llm(str(folder))
    assert isinstance(error.value.__cause__, AttributeError)


def test_a_repositorys_own_code_is_refused_and_not_run(folder):
    (folder / "own.py").write_text("import pathlib\npathlib.Path(__file__).with_name('executed').touch()\n")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    with pytest.raises(
        ModelUnavailable, match=r"wants to run its own code: read it, then set model\.trust_remote_code=true"
    ):
        load_llm(str(folder))
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(("arguments", "trusts"), [({}, False), ({"trust_remote_code": True}, True)])
def test_remote_code_is_trusted_only_on_request(hub, monkeypatch, arguments, trusts):
    asked = []

    def read(source, **options):
        asked.append((source, options["trust_remote_code"], options["revision"]))
        return LlamaConfig()

    def model(source, **options):
        asked.append((source, options["trust_remote_code"], options["revision"]))
        assert options["use_safetensors"] is True
        raise OSError("far enough")

    hub(None)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", read)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", read)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", model)
    with pytest.raises(ModelUnavailable, match="far enough"):
        load_llm(HUB_NAME, revision="v2", **arguments)
    assert asked == [(HUB_NAME, trusts, "v2")] * 3


def test_a_saved_model_comes_back_exactly(saved):
    built, loaded = build_tiny_llm(), load_llm(str(saved), dtype="float32")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(tokens).logits, built.model(tokens).logits)
    assert (loaded.digest, loaded.shape, loaded.name) == (built.digest, built.shape, str(saved))
    assert loaded.tokenizer.encode("prune") == built.tokenizer.encode("prune")
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_asked_for_is_the_type_of_all_weights(saved, dtype):
    expected = getattr(torch, dtype)
    for llm in (load_llm(str(saved), dtype=dtype), load_llm("tiny", dtype=dtype)):
        assert {p.dtype for p in llm.model.parameters()} == {expected} and llm.dtype == expected
        assert llm.shape.bytes_per_parameter == expected.itemsize


@pytest.mark.parametrize(
    ("device", "has_gpu", "expected"), [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu")]
)
def test_the_automatic_device_is_the_gpu_if_there_is_one(saved, monkeypatch, device, has_gpu, expected):
    class Moved(Exception):
        pass

    class Stub:
        def to(self, device):
            raise Moved(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(loading, "_from_pretrained", lambda *_: (Stub(), None))
    with pytest.raises(Moved, match=f"^{expected}$"):
        load_llm(str(saved), device=device)
