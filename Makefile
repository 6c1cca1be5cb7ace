# Two commands do everything: `make up` runs Baton, `make test` tests it. Each sets up what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MEMBERS := proto libs/runtime libs/engine libs/handoff libs/worker services/frontend services/router services/prefill \
	services/decode services/kvtransfer cli
SOURCES := $(wildcard $(addsuffix /src,$(MEMBERS)))

HANDOFF_BENCHES := $(addprefix bench/,handoff_transports.py handoff_latency.py books_throughput.py)

# make up MODEL=folder UP="--engine sim --profile instant --port 9000"
UP ?=
SOAK ?=
ROLLING ?=
STREAM ?=
STREAMS ?=
SPIKE ?=
MEMORY ?=
MODEL ?=
FAULTS ?=
COMPOSE ?=
MIXED ?=

# Tests of units, and of clusters that no second cluster beside them disturbs, run in several processes. The faults have the machine
# to themselves: they measure time.
WORKERS ?= logical
AT_ONCE := -n $(WORKERS) --maxprocesses 4 --dist worksteal
UNITS := $(addsuffix /tests,$(MEMBERS))
ALONE := tests --ignore tests/e2e --ignore tests/sglang
# Processes are started by the hundred: not one should compile our sources again, whatever the environment says.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help up test test-unit test-e2e test-slow test-faults test-rolling test-clients test-compose test-sglang test-observability soak test-alone \
	check format lint types proto proto-check \
	bench-handoff bench-stream bench-streams bench-spike bench-memory bench-mixed bench-sglang plot-handoff trace-waterfall ci clean

help: ## show this text
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/.ready: requirements-dev.txt constraints.txt $(addsuffix /pyproject.toml,$(MEMBERS))
	@echo "setting up $(VENV) (about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt hatchling editables
	@$(BIN)/pip install -q --disable-pip-version-check --no-build-isolation -r requirements-dev.txt
	@touch $@

# The stubs' generator needs an older protobuf than the rest.
$(VENV)-proto/.ready:
	@test -x $(VENV)-proto/bin/python || $(PYTHON) -m venv $(VENV)-proto
	@$(VENV)-proto/bin/pip install -q --disable-pip-version-check 'grpcio-tools==1.71.2' 'setuptools<81'
	@touch $@

# Clients of other people, each set with the versions it was run with.
$(VENV)-clients/%/.ready: tests/thirdparty/requirements-%.txt
	@echo "setting up $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

# Another engine's packages: a list that is complete, and asks for nothing more.
$(VENV)-sglang/.ready: tests/sglang/requirements.txt
	@echo "setting up $(@D): SGLang on a CPU, 3.6 GB (some minutes)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/pip install -q --disable-pip-version-check --no-deps -r $<
	@touch $@

up: $(VENV)/.ready ## start Baton: five services, etcd, the demo model (MODEL=folder for a real one)
	@$(BIN)/baton up $(if $(MODEL),--model $(MODEL)) $(UP)

test: $(VENV)/.ready ## every test: units of all members, then real processes
	@status=0; $(BIN)/pytest $(AT_ONCE) -m "not slow" $(UNITS) tests/e2e || status=1; \
		$(BIN)/pytest -m "not slow" $(ALONE) || status=1; exit $$status

test-unit: $(VENV)/.ready ## the members' own tests
	$(BIN)/pytest $(AT_ONCE) -m "not slow" $(UNITS)

test-e2e: $(VENV)/.ready ## tests with real processes
	$(BIN)/pytest -m "not slow" tests --ignore tests/sglang

test-slow: $(VENV)/.ready ## what takes longer: ten times as many random histories of the handoff protocol, more faults, a longer soak
	@status=0; $(BIN)/pytest $(AT_ONCE) -m slow $(UNITS) tests/e2e || status=1; \
		$(BIN)/pytest -m slow $(ALONE) || status=1; exit $$status

test-faults: $(VENV)/.ready ## the whole fault matrix, as root (half an hour per transport on an idle machine; FAULTS="--transports shm"); writes docs/faults.md
	$(BIN)/python tests/faults/matrix.py --json bench/results/fault-matrix-$$(date +%F).json --markdown docs/faults.md $(FAULTS)

test-rolling: $(VENV)/.ready ## every instance of every service restarted under load, six rounds (ROLLING="--rounds 1"); writes bench/results/rolling-DATE.json
	$(BIN)/python tests/load/rolling.py --json bench/results/rolling-$$(date +%F).json $(ROLLING)

test-clients: $(VENV)/.ready $(VENV)-clients/sdk/.ready $(VENV)-clients/aiperf/.ready ## openai, LangChain, litellm, aiperf and schemathesis against a real Baton (five minutes; docs/clients.md)
	$(BIN)/python tests/thirdparty/run.py --sdk $(VENV)-clients/sdk/bin/python --aiperf $(VENV)-clients/aiperf/bin/python \
		--results bench/results/clients-$$(date +%F)

test-compose: $(VENV)/.ready ## compose/ run for real on a container engine of its own: scale, kill, cut off, pause, stop (root, Debian 12; four minutes; docs/compose.md)
	$(BIN)/python tests/compose/run.py $(COMPOSE)

test-sglang: $(VENV)/.ready $(VENV)-sglang/.ready ## SGLang servers as engines, alone and in pairs, on CPU: exact, cancelled, killed, KV held on to (docs/engine-sglang.md)
	BATON_SGLANG_PYTHON=$(VENV)-sglang/bin/python $(BIN)/pytest tests/sglang

test-observability: $(VENV)/.ready ## a real Prometheus scrapes a cluster; every dashboard and alert query returns data; writes docs/dashboard-queries.md
	$(BIN)/python tests/compose/observe.py --markdown docs/dashboard-queries.md

soak: $(VENV)/.ready ## 100,000 handoffs under random faults, 20 minutes; writes bench/results/soak-DATE.json (SOAK="--seed 1 --handoffs 1000")
	$(BIN)/python tests/load/soak.py --json bench/results/soak-$$(date +%F).json $(SOAK)

test-alone: $(VENV)/.ready ## build each service from its declared dependencies alone and run its tests there
	$(BIN)/python tests/alone/build_alone.py

check: lint types proto-check ## format, lint, types, contracts

format: $(VENV)/.ready ## rewrite files in the house format
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: $(VENV)/.ready
	$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/lint-imports

types: $(VENV)/.ready
	$(BIN)/mypy $(SOURCES)

proto: $(VENV)-proto/.ready ## regenerate the stubs
	$(VENV)-proto/bin/python proto/generate.py
	$(VENV)-proto/bin/python libs/runtime/generate.py

proto-check: $(VENV)/.ready $(VENV)-proto/.ready
	cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf format -d --exit-code
	cd proto && ../$(BIN)/buf breaking --against $$(ls -v releases/*.binpb | tail -n 1 | sed 's|^|./|')
	$(VENV)-proto/bin/python proto/generate.py --check
	$(VENV)-proto/bin/python libs/runtime/generate.py --check

bench-handoff: $(VENV)/.ready ## GB/s of the transports, time from announce to confirm, handoffs per second of the books, a plot (six minutes)
	@status=0; for script in $(wildcard $(HANDOFF_BENCHES)); do \
		echo "== $$script" >&2; $(BIN)/python $$script || status=1; done; $(BIN)/python bench/plot_handoff.py || status=1; exit $$status

bench-stream: $(VENV)/.ready ## the frontend beside the peer's: tokens/s, CPU per token, latency (six minutes; STREAM="--no-peer --cases stream-256"); installs the peer
	@$(BIN)/python bench/stream_beside_peer.py $(STREAM); status=$$?; $(BIN)/python bench/plot_stream.py; exit $$status

trace-waterfall: $(VENV)/.ready ## draw one real trace over all five services: docs/trace-waterfall.svg
	$(BIN)/python bench/trace_waterfall.py

plot-handoff: $(VENV)/.ready ## draw the newest results of bench-handoff and soak: bench/results/handoff.svg
	$(BIN)/python bench/plot_handoff.py

bench-mixed: $(VENV)/.ready ## chats alone and beside 16k-token summarisation jobs, in modelled time, on sim and on torch; a plot (ten minutes; MIXED="--parts sim")
	$(BIN)/python bench/chat_beside_summaries.py $(MIXED)

bench-sglang: $(VENV)/.ready $(VENV)-sglang/.ready ## one SGLang server on CPU asked directly and through Baton (one minute)
	BATON_SGLANG_PYTHON=$(VENV)-sglang/bin/python $(BIN)/python bench/sglang_overhead.py

bench-streams: $(VENV)/.ready ## 50,000 concurrent streams on this host (three minutes, 4 GB, 20,000 open files; STREAMS="--streams 5000 --open-rate 500")
	$(BIN)/python bench/streams.py $(STREAMS)

bench-spike: $(VENV)/.ready ## 20,000 new streams within one second beside 100 running chats (two minutes; SPIKE="--streams 2000")
	$(BIN)/python bench/spike.py $(SPIKE)

bench-memory: $(VENV)/.ready ## sizes of all processes over a million short requests (half an hour; MEMORY="--requests 100000")
	$(BIN)/python bench/short_memory.py $(MEMORY)

ci: ## what continuous integration runs
	bash .ci/run

clean: ## remove environments and run data
	rm -rf $(VENV) $(VENV)-proto $(VENV)-clients $(VENV)-sglang .baton build
