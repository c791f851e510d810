# `make train`, `make demo` and `make test` set up .venv by themselves. Another Python (3.10 or later; for the tests 3.11): make train PYTHON=python3.12
PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check
# Two workers of one thread each; tests/conftest.py keeps together the tests that share what takes long to make.
PYTEST = .venv/bin/python -m pytest -n 2 --dist loadgroup --durations 15

.PHONY: train demo test test-all test-slow lint docs
.DELETE_ON_ERROR:

train: .venv/installed
	.venv/bin/python train.py fit --config configs/quickstart.yaml
	.venv/bin/python train.py test

# With another network: make demo NETWORK=weights/resnet20_cifar10
NETWORK = weights/cbam_resnet20_cifar10

demo: .venv/installed
	.venv/bin/python train.py predict --ckpt_path $(NETWORK) --images docs/samples --top 1 --output logs/predictions.csv
	.venv/bin/python train.py visualize --ckpt_path $(NETWORK) --images docs/samples

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: lint
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-dev
	$(PYTEST) -m slow

test-all: lint
	$(PYTEST)

# Warnings are errors: a link that leads nowhere, a docstring that cannot be read.
docs: .venv/installed-docs
	.venv/bin/python -m sphinx -W --keep-going -q -c docs . docs/_build/html
	@echo "open docs/_build/html/index.html"

.venv/installed: requirements.txt
	@echo "installing torch and the rest into .venv (5.6 GB, one to three minutes)"
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	@touch $@

.venv/installed-docs: requirements-docs.txt .venv/installed
	$(PIP) -r requirements-docs.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt requirements-docs.txt .venv/installed
	$(PIP) -r requirements-dev.txt
	@touch $@
