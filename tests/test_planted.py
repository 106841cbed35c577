"""check_vjp finds every planted bug, and names it."""

import pytest

from fcfunc.testing import check_vjp
from tests.planted import PLANTED, RIGHT
from tests.rules import slow


def test_the_corpus_is_large_enough_and_has_no_name_twice():
    assert len(PLANTED) >= 60
    assert len({bug.name for bug in PLANTED}) == len(PLANTED)


@pytest.mark.parametrize(
    "bug", [slow(bug) if i % 3 else bug for i, bug in enumerate(PLANTED)], ids=[bug.name for bug in PLANTED]
)
def test_a_planted_bug_is_found_by_a_check_that_names_it(bug):
    for fast in (True, False):  # most are found in the fast mode, which the full one includes
        report = check_vjp(bug.fun, bug.args, fast=fast, only=bug.found_by, **bug.options)
        if report.findings:
            return
    pytest.fail(str(report))


@pytest.mark.parametrize(
    "rule",
    [rule if rule.name in ("affine", "relu") else slow(rule) for rule in RIGHT],
    ids=[rule.name for rule in RIGHT],
)
def test_the_same_rules_without_a_bug_pass(rule):
    skip = ("sharded_equals_unsharded", "shard_map_equals_unsharded")  # textbook rules do fail there
    report = check_vjp(rule.fun, rule.args, fast=True, skip=skip, **rule.options)
    assert report.ok, report
