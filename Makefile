# Everything starts here: `make` lists what can be asked for. Each target first sets up .venv from requirements.lock,
# which takes minutes once and nothing afterwards.
BIN := .venv/bin
INSTALLED := .venv/.installed

CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
WORKERS ?= 2
HYDRA ?= experiment=demo

# One benchmark if NAME is given to make; a NAME of the environment (some systems set one) is not meant.
ifeq ($(origin NAME),command line)
BENCHMARKS := $(NAME)
else
BENCHMARKS := $(patsubst benchmarks/%.py,%,$(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))))
endif

# Neither demo nor tests touch the network; of the benchmarks train_step does, through pip, the first time.
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: help env demo plan verify figures test lint bench pretrain clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

env: $(INSTALLED) ## set up .venv from requirements.lock

demo: $(INSTALLED) ## the small study: from text to figures and results/report.html
	@$(OFFLINE) $(BIN)/snakemake --cores $(CORES) --config hydra="experiment=demo"
	@$(OFFLINE) $(BIN)/python scripts/report.py experiment=demo

plan: $(INSTALLED) ## what a run would do and why: make plan HYDRA="experiment=demo dictionary.k=[8,16]"
	@set -f; $(BIN)/python scripts/plan.py $(HYDRA)

verify: $(INSTALLED) ## compare all of results/ with its checksums; SET_ASIDE=1: count what is damaged as missing
	@$(BIN)/python scripts/verify.py $(if $(SET_ASIDE),--set-aside)

figures: $(INSTALLED) ## all figures that an experiment can ask for, with a sentence each
	@$(BIN)/python -m saeflow.figures

test: $(INSTALLED) ## the tests, in WORKERS processes (2): make test PYTEST_ARGS="-k plan"
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(INSTALLED) ## formatting, lint, types and imports of code and workflow
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

bench: $(INSTALLED) ## all benchmarks, or one: make bench NAME=caching
	@failed=; \
	for name in $(BENCHMARKS); do \
	  echo "benchmarks/$$name.py" >&2; \
	  $(OFFLINE) $(BIN)/python "benchmarks/$$name.py" || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "make bench: failed:$$failed" >&2; exit 1; fi

pretrain: $(INSTALLED) ## train the embedded language model anew, into results/pretrain
	@$(BIN)/snakemake --cores $(CORES) pretrain

clean: ## remove results, logs and caches
	rm -rf results/* logs .snakemake build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name '.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## also remove .venv
	rm -rf .venv .venv-bench src/saeflow.egg-info

$(INSTALLED): requirements.lock pyproject.toml scripts/make_env.sh
	@bash scripts/make_env.sh
	@touch $@
