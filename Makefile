# CI runs the same targets.
PYTHON ?= python3
HOST ?= 127.0.0.1
PORT ?= 8000
GRPC_PORT ?= 8001
OUT ?= .
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help serve test nightly check format docs screenshots proto images bench bench-gpu chaos fuzz sbom bench-rivals clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

$(VENV)/serve.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, several gigabytes, once"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/serve.stamp
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/dev.stamp
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

serve: $(VENV)/serve.stamp ## Serve the demo on http://HOST:PORT, gRPC on GRPC_PORT
	$(BIN)/vitrail serve --host $(HOST) --port $(PORT) --grpc-port $(GRPC_PORT)

test: $(VENV)/dev.stamp ## Run the tests, two files at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

nightly: $(VENV)/dev.stamp ## Run the tests that take minutes
	$(BIN)/python -m pytest -m nightly

check: $(VENV)/dev.stamp ## Lint, formatting, types, and known vulnerabilities
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/protolint lint proto
	$(BIN)/mypy
	$(BIN)/bandit --quiet --recursive --severity-level medium --configfile pyproject.toml service models
	$(BIN)/python deploy/audit.py
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint --config deploy/hadolint.yaml Dockerfile; \
	else echo "hadolint skipped: it has no wheel for this platform"; fi

format: $(VENV)/dev.stamp ## Format, and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/docs.stamp ## Build the documentation into site/
	$(BIN)/python -m mkdocs build --strict --quiet

screenshots: $(VENV)/dev.stamp ## Take the documentation's screenshots of the page and the dashboard
	VITRAIL_SCREENSHOTS=docs/images $(BIN)/python -m pytest -m '' tests/test_playground.py \
		tests/test_deploy.py::test_grafanas_components_draw_every_panel

proto: $(VENV)/dev.stamp ## Generate service/stubs from proto/
	$(BIN)/python -m grpc_tools.protoc \
		-Iservice/stubs=proto/vitrail/v1 -Iservice/stubs=proto/inference \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--python_out=$(OUT) --grpc_python_out=$(OUT) --mypy_out=$(OUT) --mypy_grpc_out=$(OUT) \
		service/stubs/vision.proto service/stubs/open_inference.proto

images: ## Build the images with buildah; BASE=debian without a registry
	deploy/images.sh gateway
	deploy/images.sh service

bench: $(VENV)/dev.stamp ## Run the benchmarks
	$(BIN)/python -m benchmarks.comparison --servers vitrail --rounds 1 --seconds 4 --output runs/bench.json
	$(BIN)/python -m benchmarks.report runs/bench.json
	$(BIN)/python -m benchmarks.allocator
	$(BIN)/python -m benchmarks.streams
	$(BIN)/python -m benchmarks.hop
	$(BIN)/python -m benchmarks.heads
	$(BIN)/python -m benchmarks.masks
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.overload

bench-gpu: $(VENV)/dev.stamp ## Measure and check everything on a GPU, in parts that can be resumed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[gpu]'
	$(BIN)/python -m benchmarks.gpu

chaos: $(VENV)/dev.stamp ## Kill and stop processes under load, and count what is lost
	$(BIN)/python -m benchmarks.chaos

fuzz: $(VENV)/dev.stamp ## Try 100,000 hostile inputs of each kind, in parts that can be resumed
	$(BIN)/python -m tests.fuzzing

sbom: $(VENV)/dev.stamp ## Write the pinned packages as CycloneDX, to runs/sbom.json
	@mkdir -p runs
	$(BIN)/cyclonedx-py requirements constraints.txt --pyproject pyproject.toml --mc-type application \
		--output-reproducible --of JSON -o runs/sbom.json

bench-rivals: $(VENV)/dev.stamp ## Install rival servers and compare with them
	$(BIN)/python -m benchmarks.rivals install
	$(BIN)/python -m benchmarks.comparison --output runs/rivals.json
	$(BIN)/python -m benchmarks.report runs/rivals.json --output runs/images

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .rivals .mypy_cache .ruff_cache .pytest_cache build site *.egg-info
