"""Mutation testing in proofs/mutation.py: rows execute every line; mutants are detected and leave no trace."""

import ast

import pytest

from fcfunc import ops
from proofs import mutants, mutation
from tests import rules

ONLY_LARGE = "chunk_size = max(CHUNK_LOGITS"


@pytest.mark.slow
def test_every_line_of_every_rule_is_executed_by_some_row():
    executed = mutation.rows_by_line()
    missing = []
    for module, path in mutants.MODULES.items():
        source = path.read_text().splitlines()
        lines = {mutant.line for mutant in mutants.mutants_of(module)}
        missing += [source[line - 1].strip() for line in sorted(lines) if (module, line) not in executed]
    assert [line for line in missing if not line.startswith(ONLY_LARGE)] == []


@pytest.mark.parametrize(
    ("change", "verdict", "by"),
    [
        ("`1 - y` to `1 + y`", "killed", "oracle"),
        ("`upcast(y)` to `y`", "equivalent", mutation.SAME),  # y is saved in at least float32
    ],
)
def test_the_verdict_on_a_mutant_of_sigmoid(change, verdict, by):
    chosen = f"ops._activations.sigmoid_bwd: {change}"
    for mutant in mutants.mutants_of("fcfunc.ops._activations"):
        if mutant.key == chosen:
            assert mutation.verdict_of(mutant, ["sigmoid"]) == (verdict, by)
            break
    else:
        pytest.fail(f"no mutant {chosen}")


def test_a_mutant_leaves_the_modules_as_they_were():
    before = ops.relu
    table = mutants.rules_with(next(mutants.mutants_of("fcfunc.ops._activations")))
    assert table.RULES[2].name == rules.RULES[2].name
    assert table.ops.relu is not before
    from fcfunc import ops as again

    assert again.relu is before


def test_reasons_are_given_for_mutants_that_exist():
    keys = {mutant.key for module in mutants.MODULES for mutant in mutants.mutants_of(module)}
    assert set(mutation.EQUIVALENT) <= keys


@pytest.mark.parametrize("module", mutants.MODULES)
def test_every_mutant_is_another_program_text(module):
    text = ast.unparse(ast.parse(mutants.MODULES[module].read_text()))
    assert [mutant.key for mutant in mutants.mutants_of(module) if ast.unparse(mutant.tree) == text] == []
