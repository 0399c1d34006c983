# Every target builds the environment it needs; all it asks for is git, make, Python >= 3.10 and a package index for pip.
#   make demo              train, save, reload, export and draw a specialised ViT on microscopy images   (3 minutes)
#   make demo-retrieval    train a retriever of scientific figures from scratch, search by text         (4 minutes)
#   make test              the whole suite, in two processes of one thread each
#   make test-fast         without the slow tests
#   make test-floor        the fast tier on the oldest supported transformers
#   make test-torchvision  the tests that need torchvision and timm, on the newest torch
#   make docs              the documentation in build/site, from docs/ and the docstrings
#   make bench             every measured table and bar chart anew, with its peers in the same run    (30 minutes)
#   make lint | clean

PYTHON ?= python3
TESTS ?= tests
FLOOR := 5.13.0
# two processes are faster than one of two threads; a file stays in one process
PYTEST := -m pytest -n 2 --dist loadfile

export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
test test-fast test-floor test-torchvision: export OMP_NUM_THREADS := 1
export PYTHONPATH := $(CURDIR)

.PHONY: demo demo-retrieval test test-fast test-floor test-torchvision docs lint bench clean

demo: .venv/stamp
	.venv/bin/python examples/demo.py --out demo

demo-retrieval: .venv/stamp
	.venv/bin/python examples/demo_retrieval.py --out demo-retrieval

test: .venv/stamp
	.venv/bin/python $(PYTEST) $(TESTS)

test-fast: .venv/stamp
	.venv/bin/python $(PYTEST) $(TESTS) -m "not slow"

test-floor: .venv-floor/stamp
	.venv-floor/bin/python $(PYTEST) $(TESTS) -m "not slow"

test-torchvision: .venv-torchvision/stamp
	.venv-torchvision/bin/python $(PYTEST) $(TESTS) -m torchvision

docs: .venv-docs/stamp
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

lint: .venv/stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/stamp
	.venv/bin/python benchmarks/run_all.py
	.venv/bin/python docs/make_figures.py $(addprefix cost_,specialized layer_fusions feature_cache encoder_fusions modality_fusions)

clean:
	rm -rf .venv .venv-docs .venv-floor .venv-torchvision build dist demo demo-retrieval runs *.egg-info .pytest_cache .ruff_cache

.venv/stamp: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vitweave needs Python >= 3.10, got " + sys.version)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --no-input -c constraints.txt -e ".[dev,viz]"
	touch $@

# The docstrings are read, not imported, so the site needs neither torch nor vitweave.
.venv-docs/stamp: setup.cfg
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import configparser as c; p = c.ConfigParser(); p.read("setup.cfg"); \
	  print(p["options.extras_require"]["docs"])' | .venv-docs/bin/python -m pip install -q --no-input -r /dev/stdin ruff
	touch $@

# The floor shares the packages of .venv (by path) and puts the oldest supported transformers in front of them.
.venv-floor/stamp: .venv/stamp Makefile
	$(PYTHON) -m venv --clear --without-pip .venv-floor
	.venv/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > "$$(.venv-floor/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	.venv/bin/python -m pip --python .venv-floor/bin/python install -q --no-input "transformers==$(FLOOR)"
	touch $@

# Without constraints: the newest torch that torchvision goes with.
.venv-torchvision/stamp: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-torchvision
	.venv-torchvision/bin/python -m pip install -q --no-input -e ".[dev,timm]" torchvision
	touch $@
