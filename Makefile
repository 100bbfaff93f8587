# `make` lists what there is. Everything runs in the private environment .venv, set up from requirements/*.lock.
.DEFAULT_GOAL := help
PY := .venv/bin/python
HOLDFAST := .venv/bin/holdfast
ARGS ?=

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: help setup dev serve demo proof-kills proof-soak proof-faults proof-engines test-vllm test-sglang test-faults sim mutations sim-long status test test-slow test-operations sanitize lint format types imports bench docs lock clean

setup: ; @tools/setup.sh embedded
dev: ; @tools/setup.sh dev

serve: setup ## a frontend and two workers with the embedded model; ARGS="--workers 3"
	@$(HOLDFAST) serve $(ARGS)

demo: setup ## kill a worker in mid-sentence and watch the sentence go on
	@$(HOLDFAST) demo $(ARGS)

proof-kills: setup ## 200 kills with the mock engine, 50 with the embedded one; every text compared, put on record
	@$(PY) -m tests.proof.kills $(ARGS)

proof-soak: dev ## ten minutes of load, kills, freezes and drains; ARGS="--seconds 60"
	@$(PY) -m tests.proof.soak $(ARGS)

proof-faults: dev ## 200 of the simulation's plans against real processes, put on record; goes on where it was broken off
	@$(PY) -m tests.faults.campaign $(ARGS)

sim: dev ## a few hundred simulated clusters with faults, every promise checked; ARGS="--limit 60"
	@$(HOLDFAST) sim --count 380 --at-least 300 --jobs 0 $(ARGS)

mutations: dev ## plant one bug after the other and see that the simulation notices it, put on record; goes on later
	@$(PY) -m tests.sim.mutations --record $(ARGS)

sim-long: dev ## 23,000 of them on all cores, put on record; goes on where it was broken off; ARGS="--first 50000"
	@$(PY) -m tests.proof.universes $(ARGS)

status: setup ## who is there, in what state
	@$(HOLDFAST) status $(ARGS)

test: dev ## the tests, without the slow ones
	@$(PY) -m pytest -q $(ARGS)

test-slow: dev ## the slow tests: the full figures, printed
	@$(PY) -m pytest -q -m slow -s $(ARGS)

test-faults: dev ## real processes under every kind of fault, compared with the simulation; ARGS="--faults-count 20"
	@$(PY) -m pytest -q -m faults -s tests/faults $(ARGS)

test-operations: dev ## a real Prometheus, Alertmanager and haproxy with a fleet; installs them if need be (Debian)
	@tools/install_operations.sh
	@CI=$${CI:-true} $(PY) -m pytest -q -m operations tests/observability tests/balancing $(ARGS)

test-vllm: ## vLLM for real, on the CPU, in .venv-vllm (installed if need be): the adapter, then each fault once
	@tools/install_vllm.sh
	@.venv-vllm/bin/python -m tests.support.hf_model >/dev/null
	@HOLDFAST_REQUIRE_VLLM=1 tools/side_by_side.sh \
	  ".venv-vllm/bin/python -m pytest -q --durations=5 tests/engines/vllm --ignore tests/engines/vllm/test_real_handoff.py $(ARGS)" \
	  ".venv-vllm/bin/python -m pytest -q --durations=5 tests/engines/conformance/test_conformance.py tests/engines/vllm/test_real_handoff.py --engine vllm"
	@.venv-vllm/bin/python -m tests.proof.engines --engine vllm --mixed --times 1 --no-record

test-sglang: ## SGLang for real, on the CPU, in .venv-sglang (installed if need be): adapter, two halves, a cluster
	@tools/install_sglang.sh
	@.venv-sglang/bin/python -m tests.support.hf_model --dtype bfloat16 >/dev/null
	@HOLDFAST_REQUIRE_SGLANG=1 tools/side_by_side.sh \
	  ".venv-sglang/bin/python -m pytest -q --durations=5 tests/engines/sglang --ignore tests/engines/sglang/test_disaggregation.py $(ARGS)" \
	  ".venv-sglang/bin/python -m pytest -q -rs --durations=5 --timeout 900 tests/engines/conformance/test_conformance.py tests/engines/sglang/test_disaggregation.py --engine sglang"

proof-engines: ## real engines hurt under running streams, each fault three times, put on record; ARGS="--engine sglang"
	@engine=vllm; case " $(ARGS) " in *" sglang "*) engine=sglang ;; esac; tools/install_$$engine.sh; \
	.venv-$$engine/bin/python -m tests.proof.engines --engine $$engine $(ARGS)

sanitize: dev ## the C modules under AddressSanitizer and UBSan
	@$(PY) tools/sanitize.py $(ARGS)

lint: dev ## style
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: dev ## put source into its form
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: dev ## strict types
	@$(PY) -m mypy

imports: dev ## which room may use which
	@.venv/bin/lint-imports

bench: dev ## what a token, a request and a migration cost
	@$(PY) -m bench $(ARGS)

docs: dev ## write docs/reference from the code
	@$(PY) tools/reference.py

lock: ## write requirements/*.lock anew (needs uv)
	@tools/lock.sh

clean: ## remove the environment and caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis src/holdfast/kv/*.so
