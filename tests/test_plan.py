"""The planner's figures against compiled programs."""

import pytest

from fcfunc import sharding
from proofs import plan


@pytest.mark.parametrize("mode", sharding.MODES)
def test_the_planned_collectives_are_those_of_the_compiled_step(mode):
    mesh = sharding.make_mesh(model=2 if "tensor" in mode else 1)
    (dims, batch) = plan.CHECKED[1]
    numbers = plan.compared(dims, batch, mode, mesh)
    planned, compiled = numbers["all-reduce"]
    assert planned == compiled
    planned, compiled = numbers["all-gather"]
    assert planned <= compiled <= 2 * planned
    assert bool(planned) == ("fsdp" in mode)
