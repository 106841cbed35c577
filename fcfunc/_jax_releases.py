"""What differs between the supported JAX releases. No other module asks which release is installed."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex


def jaxpr_and_consts(jaxpr: Any) -> tuple[Any, Sequence]:
    """A jaxpr that an equation holds, and the values of its constants.

    Before JAX 0.12 a `ClosedJaxpr` wraps a `Jaxpr`, and only the first has values. In 0.12 they are one class, so the
    test for `ClosedJaxpr` comes first.
    """
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())
