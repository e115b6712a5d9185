# Two commands do everything on a fresh machine: `make train` and `make test`. Needs Python 3.11 or 3.12 and make; with a C++
# compiler the operations are native, and faster.
# The first that runs: a version manager's stand-in may be on PATH without the version behind it.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# What is installed with BACON_FAST_CUDA=1 serves without it too, and not the other way round: two stamps.
STAMP := $(VENV)/.installed
CUDA_STAMP := $(VENV)/.installed-cuda
NATIVE := $(shell find csrc -type f)

.PHONY: setup train test bench lint format docs aot sanitize gpu-bundle clean
setup: $(if $(filter 1,$(BACON_FAST_CUDA)),$(CUDA_STAMP),$(STAMP))

$(STAMP) $(CUDA_STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { echo "error: needs Python 3.11 or 3.12 on PATH, or PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch torchvision triton numpy pybind11 ninja setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[dev]"
	@$(BIN)/python -c "import bacon_fast.info as i; print('native extension:', i.native_extension())"
	@rm -f $(CUDA_STAMP) && touch $(STAMP) $@

train: setup
	$(BIN)/python train.py $(ARGS)

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$($(BIN)/python -c "import tomllib; \
		print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

aot:
	@$(MAKE) --no-print-directory setup BACON_FAST_CUDA=1
	$(BIN)/python -m bacon_fast.kernels.aot

# The native code under AddressSanitizer and UndefinedBehaviorSanitizer, in a package of links beside its own _C: the first
# report ends the run. Leaks are those of Python's own memory at the end.
SANITIZED := build/sanitize
SANITIZE_TESTS := tests/ops tests/data/test_augment.py tests/data/test_pixel_ops.py
sanitize: setup
	BACON_FAST_SANITIZE=1 BACON_FAST_CUDA=0 $(BIN)/python setup.py --quiet build_ext \
		--build-temp $(SANITIZED)/temp --build-lib $(SANITIZED)
	@ls $(SANITIZED)/bacon_fast/_C*.so > /dev/null
	for f in bacon_fast/*; do case $$f in */_C*) ;; *) ln -sfn $(CURDIR)/$$f $(SANITIZED)/bacon_fast/ ;; esac; done
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=1 PYTHONPATH=$(SANITIZED) \
		$(BIN)/pytest -q -p no:cacheprovider -o pythonpath=$(SANITIZED) $(or $(ARGS),$(SANITIZE_TESTS))

bench: setup
	$(BIN)/python -m benchmarks.loss --device cpu $(ARGS)

# What a GPU machine that is lent for minutes needs beside the checkout: see benchmarks/gpu_bundle.
gpu-bundle: setup
	$(BIN)/python -m benchmarks.gpu_bundle $(ARGS)

clean:
	rm -rf build dist gpu-bundle *.egg-info bacon_fast/_C*.so
