"""Programs that use fcfunc; `python -m examples.NAME --help`."""
