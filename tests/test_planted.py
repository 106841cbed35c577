"""`check_vjp` finds and names every planted bug."""

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
    report = check_vjp(bug.fun, bug.args, only=bug.found_by, **bug.options)
    assert report.findings, report


@pytest.mark.parametrize(
    "rule",
    [rule if rule.name in ("affine", "relu") else slow(rule) for rule in RIGHT],
    ids=[rule.name for rule in RIGHT],
)
def test_the_same_rules_without_a_bug_pass(rule):
    # The textbook rules support only rank-2 arrays, a single device, and integer class labels.
    require = ("second_order", "sizes") if rule.name == "cross_entropy" else ("second_order", "extremes", "sizes")
    report = check_vjp(rule.fun, rule.args, require=require, skip=("ranks", "meshes"), **rule.options)
    assert report.ok, report
