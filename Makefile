.PHONY: check test bench format

check: ## format, lint, types, tests
	ruff format --check . && ruff check . && mypy && pytest

format: ## rewrite the sources in the house style
	ruff format . && ruff check --fix .

test: ## the tests
	pytest

bench: ## throughput against plain PyTorch and torch.compile
	pytest benchmarks/
