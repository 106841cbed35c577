"""The checks that `check_vjp` runs, by group and in order."""

from collections.abc import Iterator

from fcfunc.testing import _contract, _meshes, _numbers, _points, _transforms
from fcfunc.testing._case import Case, NotApplicable
from fcfunc.testing._compare import Finding, attempt


def multiprecision(case: Case) -> Iterator[Finding]:
    """Compares the gradient with central differences of the function in 200-digit arithmetic."""
    return (yield from _with_mpmath().first_derivative(case))


def second_multiprecision(case: Case) -> Iterator[Finding]:
    """Compares the derivative of the rule's gradient with its central differences in 200-digit arithmetic."""
    return (yield from _with_mpmath().second_derivative(case))


def more_accurate(case: Case) -> bool:
    """Whether the rule is right in 200-digit arithmetic and more accurate than automatic differentiation in float64."""
    found, ended = attempt(multiprecision(case))
    return not found and isinstance(ended, str) and _with_mpmath().nearer_than_autodiff(case)


def _with_mpmath():
    try:
        from fcfunc.testing import _multiprecision
    except ImportError:
        raise NotApplicable("needs mpmath: pip install mpmath") from None
    return _multiprecision


CHECKS = {
    "": (
        _contract.repeatable,  # first, so that a rule with hidden state is not blamed on a later check
        _numbers.oracle, multiprecision,
        _contract.cotangent_types, _contract.integer_arguments, _contract.rule_used,
        _numbers.projected_differences, _numbers.adjoint, _numbers.forward_mode,
        _contract.forward_output, _contract.zero_cotangent, _contract.linear_in_cotangent,
        _contract.partial_cotangents, _contract.interleaved, _contract.arguments_untouched,
        _numbers.precision_of_dtypes, _points.kinks,
        _transforms.compiled_equals_eager, _transforms.vmap_equals_loop, _transforms.scan_and_checkpoint,
        _numbers.shape_sweep,
    ),
    "second_order": (
        _transforms.reverse_over_reverse, _transforms.forward_over_reverse, second_multiprecision,
    ),
    "extremes": (
        _points.accuracy, _points.nan_at_zero, _points.extremes, _points.nan_kept, _points.spoiled_cotangents,
        _points.other_integers,
    ),
    "sizes": (_numbers.finite_differences, _numbers.every_size, _numbers.ranks),
    "meshes": (_meshes.sharded_equals_unsharded, _meshes.shard_map_equals_unsharded),
}  # fmt: skip
"""The checks that every rule must pass are under the empty name; a group fails the report only if it is required."""

GROUPS = tuple(filter(None, CHECKS))

ON_REQUEST = ("sizes",)
"""The groups that run only if they are required, because they compile many programs."""

WITH_ORACLE = {
    "oracle", "multiprecision", "second_multiprecision", "projected_differences", "finite_differences", "adjoint",
    "precision_of_dtypes", "kinks", "shape_sweep", "every_size", "ranks", "accuracy", "extremes",
    "reverse_over_reverse", "forward_over_reverse", "sharded_equals_unsharded", "shard_map_equals_unsharded",
}  # fmt: skip
"""The checks that compare with something independent of the rule; their findings for an argument have one cause."""
