"""Differences between the jaxprs of the supported JAX releases, 0.10 to 0.12."""

from collections.abc import Sequence
from typing import Any

import jax.extend.core as jex

ClosedJaxpr: Any = getattr(jex, "ClosedJaxpr", jex.Jaxpr)
"""Before JAX 0.12, this class wraps a `Jaxpr` and the values of its constants; in 0.12, the two classes are one."""


def is_jaxpr(param: Any) -> bool:
    """Whether a parameter of an equation is a jaxpr."""
    return isinstance(param, ClosedJaxpr | jex.Jaxpr)


def jaxpr_and_consts(jaxpr: Any) -> tuple[Any, Sequence]:
    """The jaxpr that is a parameter of an equation, and the values of its constants.

    `ClosedJaxpr` is tested first, because a `Jaxpr` without values exists only before 0.12.
    """
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, ClosedJaxpr) else (jaxpr, ())


def scan_arguments(params: dict, values: list) -> tuple[list, list, list]:
    """Splits the arguments of a scan into constants, initial carry and scanned arrays."""
    if "ft_in" in params:  # since 0.12
        consts, carry, xs = params["ft_in"].update(values).unpack()
        return list(consts), list(carry), list(xs)
    consts, carry = params["num_consts"], params["num_consts"] + params["num_carry"]
    return values[:consts], values[consts:carry], values[carry:]
