# The front door: `make demo` shows what Zeoid does, `make test` proves it.
# Everything is installed into environments of its own below this folder; nothing is changed outside.

PYTHON ?= python3
VENV := .venv
ZOPE_VENV := .venv-zope
RUN := $(VENV)/bin/python

.PHONY: help demo test test-all check bench fuzz fuzz-guided torture torture-cache pack-million hostile clean

help:
	@echo "make demo           a storage server and three Zope processes that share it (CHECK=1: prove it and leave)"
	@echo "make test           checks, then the tests"
	@echo "make test-all       the tests with every combination of client, server and coding"
	@echo "make check          ruff, mypy --strict, layers, documentation of every option"
	@echo "make bench          Zeoid beside ZEO, FileStorage and a bare socket; writes bench/results/"
	@echo "make fuzz           throw bytes at the decoders (FUZZ_SECONDS=60)"
	@echo "make fuzz-guided    the same, guided by coverage, for one of the targets (TARGET=session SECONDS=60)"
	@echo "make torture        kill server and clients again and again, and lose nothing (SECONDS=600 SEED=...)"
	@echo "make torture-cache  the same for the cache that processes share, and read nothing wrong (SECONDS=300 SEED=...)"
	@echo "make pack-million   pack a million objects, and see whether the bar tells the truth (OBJECTS=1000000)"
	@echo "make hostile        attack a server with thousands of connections, and measure what others notice"

# A Debian without the package python3-venv has Python but cannot make an environment.
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Zeoid needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@rm -rf $(1)
	$(PYTHON) -m venv $(1)
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
endef

$(VENV)/.ready: pyproject.toml
	$(call make_venv,$(VENV))
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Zope, with ZEO's stock client, in an environment of its own: it needs nothing of Zeoid.
$(ZOPE_VENV)/.ready: demo/requirements.txt
	$(call make_venv,$(ZOPE_VENV))
	$(ZOPE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --requirement demo/requirements.txt
	@touch $@

demo: $(VENV)/.ready $(ZOPE_VENV)/.ready
	@$(RUN) -m demo $(if $(CHECK),--check)

test: $(VENV)/.ready $(ZOPE_VENV)/.ready check
	$(RUN) -m pytest $(PYTEST_ARGS)

test-all: $(VENV)/.ready $(ZOPE_VENV)/.ready check
	$(RUN) -m pytest --every-combination $(PYTEST_ARGS)

check: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet src || { echo "run: $(VENV)/bin/ruff format src"; exit 1; }
	$(VENV)/bin/mypy
	$(RUN) -m pytest -q tests/test_architecture.py tests/test_documentation.py

bench: $(VENV)/.ready
	$(RUN) -m bench $(BENCH_ARGS)

fuzz: $(VENV)/.ready
	$(RUN) -m tests.fuzz --seconds $(or $(FUZZ_SECONDS),60)

fuzz-guided: $(VENV)/.ready
	@$(RUN) -c 'import atheris' 2>/dev/null || $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[fuzz]'
	$(RUN) -m tests.fuzz.guided $(or $(TARGET),session) --seconds $(or $(SECONDS),60)

torture: $(VENV)/.ready
	$(RUN) -m tests.torture --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

torture-cache: $(VENV)/.ready
	$(RUN) -m tests.torture_cache --seconds $(or $(SECONDS),300) $(if $(SEED),--seed $(SEED))

pack-million: $(VENV)/.ready
	$(RUN) -m tests.pack_million $(if $(OBJECTS),--objects $(OBJECTS))

hostile: $(VENV)/.ready
	$(RUN) -m tests.hostile $(HOSTILE_ARGS)

clean:
	rm -rf $(VENV) $(ZOPE_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
