# All commands for a clone; each target first installs its requirements.
#   make demo          builds a tiny demo, and compares training with and without HeRA (CPU, minutes; recipes/README.md)
#   make study         compares the objectives in a rendered world; STUDY=smoke|default (CPU; docs/study.md)
#   make real          trains SmolLM2-135M with HeRA; REAL=smoke|default|full (CPU; docs/real_model.md)
#   make test          runs all tests, including those in a browser
#   make test-fast     runs the quick tests of the method, without a host
#   make test-host HOST=<folder>   runs all tests with a checkout of LLaMA-Factory
#   make test-latest   tests the method and the trainers for transformers and TRL with the newest releases
#   make test-axolotl  tests the plugin in axolotl, with Python 3.12; PYTHON312=<path> if PATH has no python3.12
#   make test-swift    tests the plugin in ms-swift, which needs a newer `datasets` than LLaMA-Factory allows
#   make lint          runs ruff, import-linter, deptry and mypy
#   make docs          builds the documentation site in artifacts/site
#   make release       builds wheels and sdists of both distributions in dist, and checks their metadata
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
REAL_STAMP := $(VENV)/.real
DOCS := .venv-docs
CHROMIUM := $(VENV)/.chromium
STUDY ?= default
REAL ?= default
WORKERS ?= 2
# the tests of a file share its fixtures, so one worker runs the entire file
TESTS := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python $(TESTS)
LATEST ?= transformers peft accelerate trl
AXOLOTL ?= 0.21.0
PYTHON312 ?= python3.12
METHOD_TESTS := $(addprefix tests/,alignment heads objectives teachers training selection)

# caches stay inside the project, and no target needs a model hub
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions
export HF_HUB_OFFLINE := 1
# with several devices, the host starts `torchrun` from PATH
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

# $(call layer,folder,packages): makes an environment on top of the one from `make setup`. The given packages replace the
# lower environment's versions, but torch stays the same.
define layer
	rm -rf $(1)
	$(BIN)/python -m venv --without-pip $(1)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
	  > "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/layer.pth"
	for file in $$(grep -lI "^#!.*$(BIN)/python" $(BIN)/*); do \
	  sed "1c#!$(abspath $(1))/bin/python" "$$file" > $(1)/bin/$$(basename $$file); done
	chmod +x $(1)/bin/*
	$(BIN)/python -m pip --python $(1)/bin/python install --quiet --upgrade $(2)
endef

# $(call test_in,folder,tests)
test_in = PATH="$(CURDIR)/$(1)/bin:$$PATH" $(1)/bin/python $(TESTS) $(2)

.PHONY: demo study real test test-fast test-host test-latest test-axolotl test-swift lint docs release lines setup clean

setup: $(STAMP)

$(STAMP): constraints.txt pyproject.toml patches/pyproject.toml $(addprefix patches/llamafactory_hera_patches,.pth .start)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]" --editable ./patches
	touch $@

demo: $(STAMP)
	@$(BIN)/python recipes/demo --compare

# a stopped run continues when the command is repeated
study: $(STAMP)
	$(BIN)/python recipes/study --size $(STUDY)

# a stopped run continues when the command is repeated
real: $(REAL_STAMP)
	@$(BIN)/python recipes/real $(REAL)

$(REAL_STAMP): $(STAMP)
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[real]" 2> $@.log \
	  || { echo "real: the packages of [real] cannot be installed ($@.log); run make again with a network connection" >&2; exit 2; }
	@touch $@

# the browser for tests/board: the installed one, or Debian's package if the user is root, or Playwright's download
$(CHROMIUM): $(STAMP)
	test -x /usr/bin/chromium \
	  || { test "$$(id -u)" = 0 && apt-get update && apt-get install -y chromium; } \
	  || $(BIN)/playwright install chromium
	touch $@

test: $(STAMP) $(CHROMIUM)
	$(PYTEST)

test-fast: $(STAMP)
	$(PYTEST) -m "not slow" $(METHOD_TESTS) $(addprefix tests/,rivals calibration docs) $(wildcard tests/test_*.py)

test-host: $(if $(HOST),$(STAMP) $(CHROMIUM))
	@test -n "$(HOST)" || { echo 'usage: make test-host HOST=<folder of a checkout of LLaMA-Factory>' >&2; exit 2; }
	$(call layer,.venv-host,$(HOST))
	$(call test_in,.venv-host)

# LLaMA-Factory forbids these versions, so this target skips its tests
test-latest: $(STAMP)
	$(call layer,.venv-latest,$(LATEST))
	$(call test_in,.venv-latest,$(METHOD_TESTS) $(wildcard tests/integrations/test_tr*.py))

# axolotl pins every version, including torch's, so it gets a complete environment of its own (8 GB)
test-axolotl:
	@$(PYTHON312) -c "import sys; sys.exit(sys.version_info < (3, 12))" 2> /dev/null \
	  || { echo "test-axolotl: $(PYTHON312) is not Python 3.12, which axolotl needs; add PYTHON312=<path of a Python 3.12>" >&2; exit 2; }
	test -x .venv-axolotl-$(AXOLOTL)/bin/python || $(PYTHON312) -m venv .venv-axolotl-$(AXOLOTL)
	.venv-axolotl-$(AXOLOTL)/bin/python -m pip install --quiet axolotl==$(AXOLOTL) torchvision pytest pytest-timeout \
	  pytest-xdist --editable ".[demo]"
	$(call test_in,.venv-axolotl-$(AXOLOTL),tests/integrations/test_axolotl.py)

# test_hosts.py compares ms-swift with LLaMA-Factory, which would refuse this version of datasets
test-swift: export DISABLE_VERSION_CHECK := 1
test-swift: $(STAMP)
	$(call layer,.venv-swift,ms-swift==4.6.0 qwen_vl_utils datasets==4.8.4)
	$(call test_in,.venv-swift,$(addprefix tests/integrations/test_,ms_swift.py hosts.py))

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/mypy

# neither the site nor a release imports the package, so this environment lacks the package's dependencies
$(DOCS)/.installed: constraints.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt mkdocs-material 'mkdocstrings[python]' ruff build hatchling twine
	touch $@

# builds the site from the files that git tracks or would add; a broken link is an error
docs: $(DOCS)/.installed
	rm -rf .cache/docs && mkdir -p .cache/docs
	git ls-files -co --exclude-standard '*.md' constraints.txt docs recipes | xargs cp --parents -t .cache/docs
	SITE_NAME="llamafactory-hera $$(sed -n 's/^__version__ = "\(.*\)"/\1/p' plugin/llamafactory_hera/__init__.py)" \
	  NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --config-file docs/mkdocs.yml
	@echo "artifacts/site/index.html; the search works only with: $(PYTHON) -m http.server --directory artifacts/site"

release: $(DOCS)/.installed
	rm -rf dist
	for project in . patches; do $(DOCS)/bin/python -m build --no-isolation --outdir dist $$project || exit 1; done
	$(DOCS)/bin/python -m twine check --strict dist/*

# prints the number of lines and files of each room
lines:
	@for room in plugin/llamafactory_hera/*/ plugin/llamafactory_hera/integrations/*/ patches tests benchmarks recipes/demo \
		recipes/study recipes/real recipes/generate; do git ls-files $$room | grep '\.py$$' | xargs cat | wc -l | tr '\n' ' '; \
		echo "lines in $$(git ls-files $$room | grep -c '\.py$$') files  $$room"; done
	@git ls-files plugin patches | grep '\.py$$' | xargs wc -l | tail -1

clean:
	rm -rf $(VENV) .venv-host .venv-latest .venv-axolotl-* .venv-swift $(DOCS) .cache hera_demo hera_study hera_real saves artifacts dist
