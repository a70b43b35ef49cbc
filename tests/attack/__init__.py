"""What breaks promises, tried: `nox -s attack`, or `python -m attack` in tests/."""
