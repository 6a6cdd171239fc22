# The words of the development loop: setup, demo, test, lint. `make help` lists all.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-unit lint format molecule bench docs collection clean
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Debian packages (as root), .venv, the llama.cpp wheel, the demonstration model
	@scripts/setup.sh

demo: setup ## deploy two real machines on this one and stream tokens from them (without root: one process pair)
	@scripts/demo.sh

test: setup ## all tests: unit, real processes with the real model, booted lab machines
	pytest -n 2 --dist loadscope --no-loadscope-reorder

test-unit: setup ## unit and contract tests alone: seconds
	pytest tests/unit tests/contract

lint: setup ## ruff, mypy strict, import-linter, ansible-lint production, yamllint, shell syntax, all tests can be collected
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	yamllint -s .
	ansible-lint --offline
	sh -n scripts/*.sh
	pytest --collect-only -qq

format: ## let ruff rewrite the code
	ruff check --fix .
	ruff format .

molecule: setup ## molecule scenarios on lab machines
	molecule test -s default
	molecule test -s lifecycle
	molecule test -s upgrade
	molecule test -s remove

bench: setup ## measure beside llama.cpp's own servers and write docs/benchmarks.md; ARGS="--only CASE --rounds N --quick --list"
	@python -m bench $(ARGS)

docs: setup ## write the generated pages: docs/settings.md, docs/errors.md, docs/cli.md
	python scripts/docs.py

collection: ## build the roles and playbooks as an Ansible collection: rbee-rbee-VERSION.tar.gz
	@python scripts/collection.py

clean: ## take the lab down and remove .venv (caches stay: they are keyed by content)
	@[ ! -e .lab ] || rbee-ctl lab down
	rm -rf .venv
