"""Comparison of test outcomes between variants."""

import json

import pytest

from dit_accel.bench.outcomes import Allowed, compare, markdown, read_records

AGAINST = {"plain": "plain", "ours": "plain"}


def record(outcome, message="", **counts):
    return {"outcome": outcome, "message": message, **counts}


def both(plain, ours, rules=()):
    return compare({"plain": {"f::t": plain}, "ours": {"f::t": ours}}, AGAINST, rules)


@pytest.mark.parametrize(
    ("plain", "ours", "differs"),
    [
        ("passed", "passed", False),
        ("failed", "failed", False),
        ("failed", "passed", False),
        ("passed", "failed", True),
        ("skipped", "failed", True),
        ("passed", "skipped", True),
    ],
)
def test_only_what_the_plain_variant_does_better_counts(plain, ours, differs):
    found = both(record(plain), record(ours, "refused"))["unexpected"]
    assert bool(found) == differs


def test_a_test_that_a_variant_never_ran_counts():
    report = compare({"plain": {"f::t": record("passed")}, "ours": {}}, AGAINST, ())
    assert report["unexpected"][0]["outcome"] == "not run"


@pytest.mark.parametrize(
    ("rule", "covered"),
    [
        (Allowed("f::t", "refused", "ours", "r"), True),
        (Allowed("f::t", "", "", "r"), True),
        (Allowed("f::other", "refused", "ours", "r"), False),
        (Allowed("f::t", "another message", "ours", "r"), False),
        (Allowed("f::t", "refused", "enable", "r"), False),
    ],
)
def test_a_rule_needs_test_message_and_variant(rule, covered):
    report = both(record("passed"), record("failed", "it was refused"), [rule])
    assert bool(report["allowed"]) == covered
    assert bool(report["unexpected"]) != covered


def test_a_failure_while_a_test_is_taken_down_replaces_its_success(tmp_path):
    lines = [
        {"test": "tests/pipelines/f::t", "outcome": "passed"},
        {"test": "tests/pipelines/f::t", "outcome": "failed"},
        {"test": "tests/pipelines/f::t", "outcome": "skipped"},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_records(tmp_path / "x.jsonl") == {"f::t": {"outcome": "failed"}}


def test_every_difference_is_in_the_text():
    rule = Allowed("", "known", "", "a documented reason")
    for message, shown in (("known", "a documented reason (1)"), ("surprising", "surprising")):
        report = both(record("passed"), record("failed", message, sparse_calls=3), [rule])
        text = markdown(report, {"plain": "as it is", "ours": "accelerated"})
        assert shown in text
        assert "| f | 1 / 0 | 0 / 1 |" in text
        assert report["counts"]["ours"]["tests_with_sparse_calls"] == 1
