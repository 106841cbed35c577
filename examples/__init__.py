"""Example programs; run `python -m examples.NAME --help` for their options."""
