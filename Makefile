# The way in. People, CI and the docs use these targets; `make help` lists them.
SHELL := bash

# Python that makes .venv (3.11 or newer); extra pip options; extra arguments for demo, test, serve, bench.
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
# The older the generator, the wider the range of runtimes its stubs run on: 1.74.0 writes gencode 6.31.1, which runs on
# protobuf 6.31.1 up to 7.x and grpcio 1.74 or newer.
GRPC_TOOLS := 1.74.0
PROTOS_STAMP := .venv-protos/.grpcio-tools-$(GRPC_TOOLS)
PROTOC = .venv-protos/bin/python -m grpc_tools.protoc -I . \
	--python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) protos/weighting/v1/weighting.proto

define require_python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Weighbridge needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not to be found')." \
			"Name another one: make venv PYTHON=python3.12" >&2; exit 1; }
endef

.DEFAULT_GOAL := help
.PHONY: help venv demo pretaught test faults ranks resume fuzz check audit format protos protos-check bench learning sharing soak serve wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## make .venv and install Weighbridge with everything it needs (the other targets do so by themselves)

$(STAMP): pyproject.toml constraints.txt
	$(require_python)
	@echo "Installing Weighbridge into .venv; the first time takes a few minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[dev]' \
		| awk '/^ *Downloading .* [MG]B\)/ || /^(Building|Installing)/ { print "  " substr($$0, 1, 110); fflush() }'
	@touch $@

demo: $(STAMP) ## pretrain a small LM four ways and compare them; at most 6 minutes on 2 CPU cores
	$(BIN)/python -m trainer_client.run --compare uniform weight-scratch select-scratch --out runs/demo --overwrite $(ARGS)

pretaught: $(STAMP) ## teach the weighter that comes with the package, and its reference; about 4 minutes
	$(BIN)/python -m benchmarks.pretaught $(ARGS)

test: $(STAMP) ## run every test
	$(BIN)/python -m pytest $(ARGS)

faults: $(STAMP) ## break the network at every call of a training loop; prints the table of faults x calls
	$(BIN)/python -m pytest tests/faults -q $(ARGS)

ranks: $(STAMP) ## train on 1, 2 and 4 ranks x 1, 2 and 4 accumulated steps; prints the table of differences
	$(BIN)/python -m pytest tests/distributed -q -s $(ARGS)

resume: $(STAMP) ## kill trainers at random steps, resume them and replay their weights, bit by bit
	$(BIN)/python -m pytest tests/integration/test_run_resume.py -q $(ARGS)

fuzz: $(STAMP) ## send a service 20,000 inputs of any kind (again with the same: ARGS='--seed S')
	$(BIN)/python -m tests.fuzz $(ARGS)

check: $(STAMP) protos-check audit ## lint, formatting, types, stubs that match the contract, and audit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# pip-audit writes its report only where it could ask. What only looks like a secret goes into the baseline, once somebody
# has looked at it: .venv/bin/detect-secrets scan --slim > .secrets.baseline
audit: $(STAMP) ## look for known holes in what is installed, and for secrets in what is here
	@echo "Looking for known holes in the installed packages"
	@work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && \
	if $(BIN)/pip-audit --local --skip-editable --progress-spinner off --timeout 5 -o "$$work/report" 2>"$$work/said"; then \
		echo "none is known"; \
	elif [[ -s $$work/report ]]; then \
		cat "$$work/report" >&2; exit 1; \
	else \
		echo "skipped, as nobody could be asked: $$(tail -n 1 "$$work/said" | cut -d : -f 1)"; \
	fi
	@echo "Looking for secrets"
	@git ls-files -z --cached --others --exclude-standard -- ':!*.safetensors' ':!*.png' | \
		xargs -0 -n 60 -P 4 $(BIN)/detect-secrets-hook --baseline .secrets.baseline --

format: $(STAMP) ## format the code and fix what the linter can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(PROTOS_STAMP) ## regenerate the stubs after a change of protos/weighting/v1/weighting.proto
	$(call PROTOC,.)

protos-check: $(PROTOS_STAMP)
	@echo "Comparing the committed stubs with freshly generated ones"
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call PROTOC,"$$fresh") && \
	for stub in weighting_pb2.py weighting_pb2.pyi weighting_pb2_grpc.py; do \
		diff -u protos/weighting/v1/$$stub "$$fresh/protos/weighting/v1/$$stub" || { \
			echo "protos/weighting/v1/$$stub does not match weighting.proto: run 'make protos' and commit it." >&2; exit 1; }; \
	done

$(PROTOS_STAMP):
	$(require_python)
	@echo "Installing grpcio-tools $(GRPC_TOOLS) into .venv-protos"
	@test -x .venv-protos/bin/python || $(PYTHON) -m venv .venv-protos
	@.venv-protos/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) grpcio-tools==$(GRPC_TOOLS)
	@touch $@

bench: $(STAMP) ## measure latency, overhead, memory, durability, replay and fair shares against their goals
	$(BIN)/python -m benchmarks $(ARGS)

learning: $(STAMP) ## learned weights against the alternatives; about 4 hours on 2 CPU cores (ARGS=--quick: 20 minutes)
	$(BIN)/python -m benchmarks.learning $(ARGS)

sharing: $(STAMP) ## one weighter for several jobs, a larger model, reduced pools; 40 minutes on 2 CPU cores
	$(BIN)/python -m benchmarks.learning.sharing $(ARGS)

soak: $(STAMP) ## kill the service 100 times while it learns and compare it with a twin; at most 15 minutes
	$(BIN)/python -m benchmarks.soak $(ARGS)

serve: $(STAMP) ## start a weighting service: gRPC on 50051, REST on 8080
	$(BIN)/python -m weighting_service $(ARGS)

wheel: $(STAMP) ## build a wheel into dist/
	@rm -rf build
	$(BIN)/python -m build --wheel --no-isolation

clean: ## remove the environments and all that was built or cached (runs/ stays)
	rm -rf .venv .venv-protos build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
