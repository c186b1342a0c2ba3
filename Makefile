# Everything runs inside .venv, made here on the first call. PYTHON names the interpreter that it is made from.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# What the caller's shell has set up for other projects must not reach this one. Where pip finds packages stays.
unexport PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_PYTHON PIP_CONSTRAINT PIP_REQUIREMENT
export PYTHONNOUSERSITE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test test-slow lint configs clean

help:
	@echo 'make demo       train a small network on generated street scenes, test it, draw the results'
	@echo 'make test       the fast tests'
	@echo 'make test-slow  the slow tests'
	@echo 'make lint       ruff: rules and format'
	@echo 'make configs    write mmseg_resnest/configs/ anew after an edit of configs/'
	@echo 'make setup      only install (the others do so too, where something is missing)'
	@echo 'make clean      delete caches and builds; results, data and .venv stay'

setup: $(INSTALLED)
	@echo "==> $(VENV) is ready"

demo: $(INSTALLED)
	@echo '==> Demo: generate scenes, train, test, draw'
	@$(PY) tools/demo.py

test: $(INSTALLED)
	@echo '==> Fast tests'
	@$(PY) -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED)
	@echo '==> Slow tests'
	@$(PY) -m pytest -n 2 --dist loadfile -m 'slow and not gpu' --durations=10

lint: $(INSTALLED)
	@echo '==> Rules'
	@$(PY) -m ruff check
	@echo '==> Format'
	@$(PY) -m ruff format --check

configs: $(INSTALLED)
	@echo '==> Writing mmseg_resnest/configs/ from configs/'
	@$(PY) tools/flatten_configs.py

clean:
	@echo '==> Deleting caches and builds'
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# mmcv depends on opencv-python, whose cv2 wants the system's libGL, libglib and libxcb, absent from a fresh Debian.
# opencv-python-headless is the same cv2 without windows, in the same folder: the last one installed is imported, and
# pip still finds both. In one call pip would install them in the wrong order, hence the step of its own.
$(INSTALLED): requirements.txt requirements-dev.txt pyproject.toml $(PY)
	@echo '==> Installing the tested set (about 6 GB on disk; a minute or more)'
	@$(PY) -m pip install --quiet -r requirements-dev.txt
	@echo '==> Replacing OpenCV by its headless build'
	@$(PY) -m pip install --quiet --force-reinstall --no-deps -c requirements.txt opencv-python-headless
	@echo '==> Installing mmseg_resnest, editable'
	@$(PY) -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(PY) -m pip check
	@touch $@

$(PY):
	@command -v '$(PYTHON)' >/dev/null || { \
	    echo '$(PYTHON): not found. Install Python 3.11 or later (Debian, Ubuntu: apt install python3 python3-venv make)'; \
	    echo 'or name yours: make PYTHON=/path/to/python3'; exit 1; } >&2
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$(PYTHON): found $$('$(PYTHON)' --version), expected Python 3.11 or later."; \
	    echo 'Install a later one and name it: make PYTHON=/path/to/python3.11'; exit 1; } >&2
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo '$(PYTHON): it cannot make virtual environments (no venv or no ensurepip).'; \
	    echo 'Debian, Ubuntu: apt install python3-venv'; exit 1; } >&2
	@echo '==> Making $(VENV)'
	@'$(PYTHON)' -m venv --clear $(VENV)
