# make demo   compiles the embedded model and draws digits with it
# make test   runs the tests
# Both make a virtual environment on the first call and share it. PYTHON and VENV can be set on the command line.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/qcgraph compile digits -o out/demo --recipe balanced --steps 50 --guidance 1.5 --force
	$(BIN)/qcgraph sample out/demo -n 20 -o out/demo.png
	@echo
	@echo "the pictures: out/demo.png"
	@echo "the compiled model and its report: out/demo/"

test: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15

# The stamps: an installation is repeated only when pyproject.toml changes. The code itself is used in place.
$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: $(VENV)/created pyproject.toml
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/created pyproject.toml
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@
