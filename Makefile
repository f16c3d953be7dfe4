# Everything a person types here. `make` alone explains itself.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON := .venv/bin/python
CORRAL := $(PYTHON) generate.py
LOCK := .venv/bin/uv --no-config pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
	--generate-hashes --no-emit-index-url --no-emit-find-links --no-header

.PHONY: help env demo demo-down test test-fast docs wheel lint format check bench-memory bench-render bench-gateway bench-litellm bench-operations bench-simulation bench clients render golden own-image open-webui flags catalogue dashboards rules schema lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## make or repair .venv; the other targets do it by themselves
	@command -v python3 >/dev/null || { echo "corral: needs Python 3.11 or newer; there is no python3 on PATH" >&2; exit 1; }
	@python3 tools/make_env.py

clients: env ## real clients against a rendered farm, from PyPI and npm; ten minutes
	@$(PYTHON) tools/try_clients.py $(ARGS)

demo: env ## the whole request path on this machine; MODEL=file.gguf or MODEL=hf:owner/repo/file.gguf
	@$(CORRAL) demo $(if $(MODEL),--model "$$MODEL")

demo-down: env ## stop the demo and leave nothing behind
	@$(CORRAL) demo --down

test: env ## all that can be tested here, and what was left out and why; ARGS="-k plan" for less
	@$(PYTHON) -m pytest -n auto --dist loadgroup --durations 10 $(ARGS)

test-fast: env ## what starts no program: a minute at most
	@$(PYTHON) -m pytest -n auto -m "not programs and not slow" tests/unit tests/rules $(ARGS)

docs: env ## the documentation as a site, in build/site; every link in it is checked
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

wheel: env ## corral as a wheel, in dist/
	@$(PYTHON) -m hatchling build -t wheel

lint: env docs ## ruff, mypy strict, and the documentation's links
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

format: env ## let ruff order imports and lay out code
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

check: lint test ## what has to be green before a commit

bench-memory: env ## estimated against reported memory of llama-server, for many architectures
	@$(PYTHON) tools/bench_memory.py $(ARGS)

bench-render: env ## render farms of 8, 80, 800 and 8 000 GPUs: time, memory, growth
	@$(PYTHON) tools/bench_render.py $(ARGS)

bench-gateway: env ## what the gateway costs and how well it shares, beside plain LiteLLM; twelve minutes of an idle machine
	@$(PYTHON) tools/bench_gateway.py $(ARGS)

bench-litellm: env ## what LiteLLM's settings are worth, in its processor time for a request; six minutes of an idle machine
	@$(PYTHON) tools/bench_litellm.py $(ARGS)

bench-operations: env ## up, changes and down of a farm in the Docker engine, and what figures cost; seven minutes
	@$(PYTHON) tools/bench_operations.py $(ARGS)

bench-simulation: env ## the simulation of `plan --what-if` beside the real balancer; ten minutes of an idle machine
	@$(PYTHON) tools/bench_simulation.py $(ARGS)

bench: bench-render bench-memory bench-operations bench-simulation bench-gateway bench-litellm ## all of it; fifty minutes of an idle machine

render: env ## write the committed rendering of the default site again
	@$(CORRAL) render

golden: render ## write the default site, expected trees and reference pages again; read the change like code
	@$(PYTHON) -m pytest tests/unit tests/rules -k "golden or fresh" --update-golden $(ARGS)

flags: env ## read llama-server's flags from llama.cpp's own parser again
	@$(PYTHON) -m tools.llama_flags

catalogue: env ## read the names of figures from the running programs again
	@$(PYTHON) -m tools.catalogue

dashboards: env ## write Grafana's pages in monitoring/dashboards again
	@$(PYTHON) -m tools.dashboards

own-image: env ## compile and test gpu-server/Dockerfile, and write the proof; twenty minutes
	@$(PYTHON) -m pytest --compile tests/compose/test_own_image.py $(ARGS)
	@$(PYTHON) -m tests.compose.own_image_proof

rules: env ## write the rules about objectives again
	@$(PYTHON) -m tools.objectives > monitoring/rules/objectives.yml.part
	@mv monitoring/rules/objectives.yml.part monitoring/rules/objectives.yml

schema: env ## write inventory.schema.json again
	@$(CORRAL) schema > inventory.schema.json.part && mv inventory.schema.json.part inventory.schema.json

open-webui: env ## Open WebUI for the tests of the chat page, in an environment of its own: 1.1 GB
	@$(PYTHON) -m tools.make_open_webui

lock: env ## lock the requirements again, with hashes; ARGS=--upgrade for newer ones
	@$(LOCK) requirements.in --output-file requirements.txt $(ARGS)
	@$(LOCK) requirements-dev.in --output-file requirements-dev.txt $(ARGS)
	@$(LOCK) requirements-uv.in --output-file requirements-uv.txt $(ARGS)
	@$(PYTHON) -m tools.make_open_webui --lock

clean: ## remove what checks and builds left; .venv stays
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	@find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
