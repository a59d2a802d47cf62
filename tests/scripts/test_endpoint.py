"""The command puts together what was asked for and serves it, or refuses in one line."""

import pytest
import uvicorn
from fastapi.testclient import TestClient

from rap_env.llm.loading import load_llm
from rap_env.policies import DensePolicy, OrderPolicy, even_order, save_policy
from scripts.endpoint import main

TINY = ["model.name=tiny", "model.dtype=float32"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RAP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def served(monkeypatch):
    """What uvicorn was given: application and options."""
    given = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: given.append((app, options)))
    return given


def test_it_serves_on_this_machine_only_and_follows_a_budget_file(served, tmp_path):
    budget, shape = tmp_path / "budget", load_llm("tiny", "float32", granularity="group", device="cpu").shape
    save_policy(OrderPolicy(shape, even_order(shape)), tmp_path / "policy")
    budget.write_text("100_000_000\n")
    main([*TINY, f"budget_file={budget}", "port=8123", f"policy={tmp_path / 'policy'}", "patience_seconds=0"])
    ((app, options),) = served
    assert options["host"] == "127.0.0.1" and options["port"] == 8123
    body = {"model": "random-llama", "prompt": "Hello", "max_tokens": 3}
    with TestClient(app) as client:
        assert client.post("/v1/completions", json=body).status_code == 200
        budget.write_text("0\n")
        assert client.post("/v1/completions", json=body).status_code == 503


@pytest.mark.parametrize("given", [["budget_bytes=100_000_000"], []])
def test_a_budget_is_a_constant_or_what_the_machine_has_free(served, given, capsys):
    main([*TINY, *given])
    assert "loading tiny" in capsys.readouterr().err  # the first line comes before what takes a while
    with TestClient(served[0][0]) as client:
        body = {"model": "random-llama", "prompt": "Hello", "max_tokens": 3}
        assert client.post("/v1/completions", json=body).status_code == 200
        n_bytes = client.get("/health").json()["budget_bytes"]
    assert n_bytes == 100_000_000 if given else n_bytes > 100_000_000


def test_bad_input_is_refused_in_one_line(served, tmp_path):
    def refused(*options: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*TINY, *options])
        return str(stopped.value)

    save_policy(DensePolicy(load_llm("tiny", "float32", device="cpu").shape), tmp_path / "policy")
    assert "expected a policy for this model" in refused(f"policy={tmp_path / 'policy'}")
    assert "expected a file with a number of bytes" in refused(f"budget_file={tmp_path / 'gone'}")
    assert "max_batch" in refused("max_batch=0")
    assert "unknown model or folder" in refused("model.name=gone")
    assert served == []
