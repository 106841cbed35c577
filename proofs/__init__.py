"""Programs that test the library's claims. Run one with `python -m proofs.NAME` from the repository root."""
