# Every target makes what it needs, the virtual environment first.  `make help` lists them.
#
#   PYTHON=python3.13   the interpreter to use; its environment stands apart, in .venv-python3.13
#   ARGS=...            more arguments for the program that the target runs: make echo ARGS=--stats

PYTHON ?=
VENV ?= .venv$(if $(PYTHON),-$(notdir $(PYTHON)))
PORT ?= 8888
ARGS ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet

# The native part is built anew when one of these changes.
NATIVE := setup.py iocp_loop/_cffi_build.py $(shell find iocp_loop/_native -type f 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help venv echo doctor test test-python-tier fuzz sanitize soak apps-environment test-apps libraries libraries-windows test-suites newcomer newcomer-windows test-all test-debian test-free-threaded stress test-windows test-windows-all msvc lint format types docs coverage bench wheel wheels test-wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

# ---------------------------------------------------------------------------------------------------------------------
# Environments: a stamp for each set of packages, so that a second run has nothing to do
# ---------------------------------------------------------------------------------------------------------------------

$(VENV)/.made:
	@tools/make_venv.sh $(VENV) $(PYTHON)
	@touch $@

# An editable install builds the native part in place.  Where it cannot be built, pip still succeeds and the doctor
# tells why a driver is missing.
define install
	@echo "installing iocp_loop$(1) into $(VENV)"
	@$(PIP) install --editable '.$(1)'
	@touch $@
endef

$(VENV)/.run: $(VENV)/.made pyproject.toml $(NATIVE)
	$(call install,)

$(VENV)/.test: $(VENV)/.made pyproject.toml $(NATIVE)
	$(call install,[test])
	@touch $(VENV)/.run

$(VENV)/.bench: $(VENV)/.made pyproject.toml $(NATIVE)
	$(call install,[bench])
	@touch $(VENV)/.run

$(VENV)/.dev: $(VENV)/.made pyproject.toml $(NATIVE)
	$(call install,[dev])
	@touch $(VENV)/.run $(VENV)/.test

# The libraries have an environment of their own: several bring plugins for pytest, which have no place in our suite.
APPS := $(VENV)-apps

$(VENV)/.apps: $(VENV)/.made pyproject.toml $(NATIVE)
	$(call install,[apps])

$(VENV)/.wheels: $(VENV)/.made pyproject.toml
	$(call install,[wheels])

venv: $(VENV)/.dev ## the environment for development, in .venv

# ---------------------------------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------------------------------

echo: $(VENV)/.run ## build, and start the echo server on port 8888 (PORT=, ARGS=)
	@exec $(RUN) -m iocp_loop.echo --port $(PORT) $(ARGS)

doctor: $(VENV)/.run ## which drivers work here, and why
	@$(RUN) -m iocp_loop

bench: $(VENV)/.bench ## the benchmarks (ARGS=)
	@$(RUN) -m benchmarks $(ARGS)

# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------

test: $(VENV)/.test ## the tests, on every driver that this machine has (ARGS=)
	@$(RUN) -m iocp_loop
	@$(RUN) -m pytest $(ARGS)

# Without the tests of what has nothing to do with the tier: the benchmarks, the examples, the drivers' bindings, and
# Windows.
NOT_OF_A_TIER := benchmarks benchmarks_runs examples choice signatures native_windows named_pipes \
    pytest_asyncio pytest_plugin echo_program run_command built recipes apps docs architecture $(patsubst tests/test_%.py,%,$(wildcard tests/test_iocp*.py tests/test_windows*.py))
WITHOUT := $(foreach name,$(NOT_OF_A_TIER),--ignore=tests/test_$(name).py)

test-python-tier: $(VENV)/.test ## the same tests on the Python tier, without those that do not touch it (ARGS=)
	@IOCP_LOOP_NATIVE=0 $(RUN) -m pytest $(WITHOUT) $(ARGS)

fuzz: $(VENV)/.test ## seeded programs on every driver and tier, compared with asyncio's own loop (ARGS="--minutes 30 tls")
	@$(RUN) -m tests.fuzz $(ARGS)

sanitize: $(VENV)/.test ## the tests under AddressSanitizer, UndefinedBehaviorSanitizer, valgrind and ThreadSanitizer (ARGS="asan valgrind tsan")
	@PYTHON=$(RUN) tools/sanitize.sh $(ARGS)

soak: $(VENV)/.test ## 100,000 connections, 1,000,000 callbacks and timers: nothing may be left (ARGS=)
	@IOCP_LOOP_SOAK=50 $(RUN) -m pytest -o faulthandler_timeout=1800 tests/test_references.py $(ARGS)

apps-environment: # what test-apps and libraries need
	@$(MAKE) --no-print-directory VENV=$(APPS) $(APPS)/.apps

test-apps: apps-environment ## the recipes and real libraries on this loop, on uring and poll (ARGS=)
	@$(APPS)/bin/python -m pytest tests/test_recipes.py tests/test_apps.py tests/test_pytest_plugin.py $(ARGS)

# Kept, so that some may be run again (ARGS="tornado") and the table is of all.
RESULTS := $(APPS)/results.json

libraries: apps-environment ## the same libraries on asyncio and uvloop too, as a table in docs/libraries.md
	@$(APPS)/bin/python -m tests.apps --results $(RESULTS) --table docs/libraries.md $(ARGS)

libraries-windows: $(VENV)/.made ## those that have Windows wheels, under Wine; then `make libraries` has them in its table (VERSION=, ARGS=)
	@PYTHON=$(RUN) tools/test_windows.sh $(VERSION) --apps $(RESULTS) $(ARGS)

test-suites: $(VENV)/.made ## other projects' own tests on this loop and on asyncio's; writes docs/suites.md (ARGS=)
	@$(RUN) tools/test_suites.py --page docs/suites.md $(ARGS)

newcomer-windows: $(VENV)/.made ## the same under Wine, from a wheel of dist/ (VERSION=, ARGS=WHEEL)
	@$(RUN) -B tools/newcomer_windows.py $(VERSION) $(ARGS)

newcomer: ## a fresh environment to a FastAPI application on this loop, with a stopwatch (ARGS=WHEEL)
	@tools/newcomer.sh $(ARGS)

test-all: $(VENV)/.dev ## the tests on every Python found here, from 3.11 on
	@$(BIN)/nox $(ARGS)

VERSIONS ?=

test-debian: $(VENV)/.made ## the tests on Pythons of Debian testing, as root (VERSIONS="3.13 3.14 3.15", ARGS=)
	@PYTHON=$(RUN) tools/test_debian.sh $(VERSIONS) $(if $(ARGS),-- $(ARGS))

test-free-threaded: $(VENV)/.made ## the tests without the GIL, on a CPython 3.14t made for it, as root (ARGS=)
	@PYTHON=$(RUN) tools/test_free_threaded.sh $(ARGS)

REPEAT ?= 100

stress: $(VENV)/.made ## loops in parallel without the GIL, 100 times over on each driver, as root (REPEAT=, ARGS=)
	@PYTHON=$(RUN) IOCP_LOOP_REPEAT=$(REPEAT) tools/test_free_threaded.sh -q tests/test_threads_in_parallel.py $(ARGS)

# auto: the version of the environment's Python, or else another that exists as Windows Python.
VERSION ?= auto

# What the functions have to do with that are emulated: waits for handles, the timer of a port, files sent by the system.
EMULATED := $(wildcard tests/test_iocp*.py tests/test_windows*.py tests/test_drivers*.py) $(patsubst %,tests/test_%.py,\
    native_iocp native_windows named_pipes subprocesses sendfile loop port proactor signals pipes failures order)

test-windows: $(VENV)/.made ## the tests on Windows Python under Wine; some of them also with what Wine lacks emulated (VERSION=, ARGS=)
	@PYTHON=$(RUN) tools/test_windows.sh $(VERSION) $(ARGS)
	@PYTHON=$(RUN) tools/test_windows.sh $(VERSION) --emulate $(or $(ARGS),$(EMULATED))

test-windows-all: $(VENV)/.made ## all of them on Wine as it is, emulated, and under a newer Wine, as root (VERSION=, ARGS=)
	@PYTHON=$(RUN) tools/test_windows.sh $(VERSION) $(ARGS)
	@PYTHON=$(RUN) tools/test_windows.sh $(VERSION) --emulate $(ARGS)
	@PYTHON=$(RUN) tools/test_newer_wine.sh $(VERSION) $(ARGS)

msvc: $(VENV)/.wheels ## the C for Windows as clang sees it when it stands in for MSVC (VERSION=)
	@$(RUN) -B tools/check_msvc.py $(VERSION)

lint: $(VENV)/.dev ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(VENV)/.dev ## let ruff format, and fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# A second run for Windows: code behind a check of sys.platform is looked at only for its own system.  These files look
# for what a system has by hasattr, which mypy does not follow, or are of no use there.
NOT_ON_WINDOWS := iocp_loop/ports/uring/driver.py iocp_loop/ports/uring/files.py iocp_loop/ports/poll/calls.py iocp_loop/ports/poll/pollers.py iocp_loop/methods/unix.py iocp_loop/pipes/unix.py
ON_WINDOWS := $(filter-out $(NOT_ON_WINDOWS),$(shell find iocp_loop -name "*.py" -not -path "*/_startup/*"))

types: $(VENV)/.dev ## mypy --strict, for Linux and for Windows
	@$(BIN)/mypy --platform linux --cache-dir .mypy_cache/linux
	@$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 --follow-imports silent $(ON_WINDOWS)

# -E: all pages anew, so that none of them keeps a warning to itself.
docs: $(VENV)/.dev ## the documentation, in docs/_build/html
	@$(BIN)/sphinx-build -W --keep-going -q -E -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

coverage: $(VENV)/.dev ## the tests under coverage, with a report
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report
	@$(BIN)/coverage html --quiet

wheel: $(VENV)/.made ## a wheel for this Python, in dist/
	@$(PIP) wheel --no-deps --wheel-dir dist .

wheels: $(VENV)/.wheels ## the sdist and the wheels for every platform, tried as far as this machine can, in dist/ (ARGS=)
	@$(RUN) -B tools/wheels.py $(ARGS)

test-wheel: $(VENV)/.made ## the tests on the wheel of dist/ for this Python, installed where nothing can compile (ARGS=)
	@$(RUN) -B tools/test_wheel.py $(ARGS)

clean: ## remove environments, caches and builds
	rm -rf .venv .venv-* .nox .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.* htmlcov
	rm -rf build dist .wheels .suites docs/_build *.egg-info iocp_loop/*.so iocp_loop/*.pyd iocp_loop/_uring.c iocp_loop/_iocp.c
	find iocp_loop tests examples benchmarks docs tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
