# make train                        everything from nothing: environment, model, training, table, record
# make train ARGS="agent=dqn"       the same with Hydra overrides
# make compare                      a small comparison of policies from nothing, with its page
# make serve                        a request trace served by several systems while memory is taken away and given back
# make rerank                       rerankers compared by seconds, memory and what they find
# make validate ARGS="evaluation.search_paths=[valid.txt] evaluation.report_paths=[test.txt]"
#                                   checks the leaderboard: bytes of all masks, losses of a sample of them
# make soak                         24 minutes of mixed load on the endpoint while its memory budget moves
# make audit                        a bill of materials of the environment, and its known vulnerabilities
# make test                         linters and the fast test suite

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# OpenMP threads that spin at barriers make everything crawl as soon as another process wants the cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: train compare serve rerank validate soak audit test model clean

train: model
	$(BIN)/python train.py $(ARGS)

compare: model
	$(BIN)/python -m experiments.compare $(ARGS)

serve: model
	$(BIN)/python -m experiments.serve $(ARGS)

rerank: model
	$(BIN)/python -m experiments.rerank $(ARGS)

validate: model
	$(BIN)/python -m experiments.validate results/leaderboard.jsonl $(ARGS)

soak: model
	$(BIN)/python -m scripts.soak $(ARGS)

audit: $(VENV)/installed
	$(BIN)/python -m scripts.audit $(ARGS)

test: model
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

model: $(VENV)/installed
	$(BIN)/python -m scripts.fetch_model

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
