# Everything starts from a bare checkout with python3 (3.11-3.13) and make.
#   make demo   render videos, train a reversible detector on them end to end, evaluate, report
#   make test   the whole test suite
#   make lint   formatting, style and types
#   make browser   Chromium for tests/test_browser.py, by apt, where there is none; without it those tests are skipped
# EXTRAS chooses the optional packages of pyproject.toml, e.g. `make test EXTRAS=dev,aot`.

PYTHON ?= python3
EXTRAS ?= dev
WORKDIR ?= runs/demo
.PHONY: demo test lint browser clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	.venv/bin/python -m re2tal_jax.main --config configs/demo.py --workdir $(WORKDIR)

test: .venv/.installed-$(EXTRAS)
	.venv/bin/python -m pytest -n 2 --dist worksteal -q

lint: .venv/.installed-$(EXTRAS)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

BROWSERS = chromium chromium-browser google-chrome google-chrome-stable
SUDO = $(if $(filter 0,$(shell id -u)),,sudo)

browser:
	@for name in $(BROWSERS); do command -v $$name && exit 0; done; \
	$(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends chromium

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python {v} found; 3.11 to 3.13 is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

.venv/.installed-$(EXTRAS): pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@
