"""Fully-connected networks as pure functions in JAX, with hand-written backward rules that are proven."""

from fcfunc import data, losses, mlp, ops, reference, testing, train
from fcfunc.mlp import apply, init

__version__ = "0.1.0"

__all__ = ["apply", "data", "init", "losses", "mlp", "ops", "reference", "testing", "train"]
