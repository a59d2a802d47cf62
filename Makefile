# make train                        everything from nothing: environment, model, training, table, record
# make train ARGS="agent=dqn"       the same with Hydra overrides
# make compare                      a small comparison of policies from nothing, with its page
# make serve                        a request trace served by several systems while memory is taken away and given back
# make rerank                       rerankers compared by seconds, memory and what they find
# make validate ARGS="evaluation.search_paths=[valid.txt] evaluation.report_paths=[test.txt]"
#                                   checks the leaderboard: bytes of all masks, losses of a sample of them
# make services                     a PostgreSQL server of your own for results that several processes share; prints store=URL
# make audit                        a bill of materials of the environment, and its known vulnerabilities
# make test                         linters and the fast test suite
# make test ARGS="-m slow"          the tests that this leaves out, a few minutes more
# make site                         the documentation as a site in build/site, every link inside it checked
# make soak                         24 minutes of mixed load on the endpoint while its memory budget moves
# make kills                        writers of one store killed at random, on SQLite and on that server

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# OpenMP threads that spin at barriers make everything crawl as soon as another process wants the cores.
export OMP_WAIT_POLICY ?= passive
# Without bytecode each of the processes that tests and sweeps start would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

# Whoever may enter this folder may use the server: it listens on a socket in it and nowhere else. PostgreSQL refuses root.
PG_DATA ?= $(CURDIR)/outputs/postgresql
PG = PATH="$$PATH:$(lastword $(wildcard /usr/lib/postgresql/*/bin))"
PG_URL = postgresql://rap@/$(1)?host=$(PG_DATA)

.PHONY: train compare serve rerank validate services test site soak kills audit model clean

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

services:
	test -d $(PG_DATA) || { mkdir -p $(dir $(PG_DATA)) && $(PG) initdb -D $(PG_DATA) -U rap -A trust -E UTF8; }
	$(PG) pg_ctl -D $(PG_DATA) status || \
	    $(PG) pg_ctl -D $(PG_DATA) -w -l $(PG_DATA)/log -o "-c listen_addresses='' -k $(PG_DATA)" start
	$(PG) psql -h $(PG_DATA) -U rap -d results -c "" 2> /dev/null || $(PG) createdb -h $(PG_DATA) -U rap results
	@echo "store='$(call PG_URL,results)'"

soak: model
	$(BIN)/python -m scripts.soak $(ARGS)

audit: $(VENV)/installed
	$(BIN)/python -m scripts.audit $(ARGS)

test: model
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow" $(ARGS)

site: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

kills: $(VENV)/installed services
	rm -rf outputs/soak && mkdir -p outputs/soak
	$(PG) dropdb -h $(PG_DATA) -U rap --if-exists soak && $(PG) createdb -h $(PG_DATA) -U rap soak
	$(BIN)/python -m experiments.kills outputs/soak/kills.json outputs/soak/results.db "$(call PG_URL,soak)"

model: $(VENV)/installed
	$(BIN)/python -m scripts.fetch_model

$(VENV)/installed: pyproject.toml constraints.txt $(wildcard rap_env/llm/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --no-deps hydra-ray-launcher
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
