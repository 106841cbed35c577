"""Programs that test what the library claims; `python -m proofs.NAME` from the repository's root."""
