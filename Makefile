# A development environment in .venv: `make install`, then `. .venv/bin/activate`.
.PHONY: install check
install:
	python3 -m venv .venv
	.venv/bin/pip install -e '.[dev]'

check:
	nox
