# Two commands do everything on a fresh Debian or Ubuntu machine: make demo, make test.

PY := .venv/bin/python
EXAMPLE := examples/fashion_mnist
# A process for each core, up to 8 (each takes about 1 GB); a file's tests share fixtures and stay together.
PYTEST_WORKERS ?= -n logical --maxprocesses 8 --dist loadfile

.PHONY: demo test lint format clean

demo:
	@tools/setup demo
	@mkdir -p build
	.venv/bin/tvm-compress compress $(EXAMPLE)/model.onnx --recipe int8 --target host \
	    --calib $(EXAMPLE)/calibration.npz --eval $(EXAMPLE)/test.npz -o build/demo
	.venv/bin/tvm-compress verify build/demo --eval $(EXAMPLE)/test.npz
	.venv/bin/tvm-compress report build/demo

test: lint
	$(PY) -m pytest $(PYTEST_WORKERS) $(PYTEST_OPTIONS)

lint:
	@tools/setup test
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format:
	@tools/setup test
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
