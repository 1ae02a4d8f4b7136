.PHONY: check test bench format gpu-check kernel-table

check: ## format, lint, types, tests
	ruff format --check . && ruff check . && mypy && pytest

format: ## rewrite the sources in the house style
	ruff format . && ruff check --fix .

test: ## the tests
	pytest

bench: ## throughput against plain PyTorch and torch.compile
	pytest benchmarks/

gpu-check: ## everything that a GPU has to say, in under nine minutes; results in $$OUT or benchmarks/results
	python benchmarks/gpu_check.py

kernel-table: ## docs/kernels.md: registers, shared memory and occupancy of every kernel
	python tests/kernels/kernel_table.py
