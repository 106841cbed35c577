"""The checks that `check_vjp` makes, in this order."""

from fcfunc.testing import _numbers, _transforms

CHECKS = (
    _numbers.repeatable,  # first: what every third call does is seen here, and not blamed on a later check
    _numbers.oracle, _numbers.precision_of_dtypes,
    _numbers.finite_differences, _numbers.projected_differences, _numbers.taylor,
    _numbers.forward_mode, _numbers.adjoint,
    _numbers.cotangent_types, _numbers.integer_arguments, _numbers.rule_used,
    _numbers.zero_cotangent, _numbers.linear_in_cotangent, _numbers.partial_cotangents, _numbers.forward_output,
    _numbers.kinks, _numbers.extremes, _numbers.interleaved, _numbers.arguments_untouched,
    _transforms.vmap_equals_loop, _transforms.compiled_equals_eager, _transforms.scan_and_checkpoint,
    _transforms.reverse_over_reverse, _transforms.forward_over_reverse,
    _transforms.sharded_equals_unsharded, _transforms.shard_map_equals_unsharded, _transforms.shape_sweep,
)  # fmt: skip

FULL_ONLY = {_numbers.finite_differences, _transforms.sharded_equals_unsharded, _transforms.shard_map_equals_unsharded}
"""The checks that the fast mode leaves out."""
