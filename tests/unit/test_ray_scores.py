"""The score by which Ray keeps the best checkpoints."""

import math
import sys

import pytest

from ray_stateful.ray_scores import with_score

MOST = sys.float_info.max


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"loss": 0.5, "n": 1}, {"loss": 0.5, "n": 1}),
        ({"n": 1}, {"n": 1, "loss": -MOST}),
        ({"loss": None}, {"loss": -MOST}),
        ({"loss": math.nan}, {"loss": -MOST}),
        ({"loss": math.inf}, {"loss": MOST}),
        ({"loss": -math.inf}, {"loss": -MOST}),
        ({"loss": 1 << 2000}, {"loss": MOST}),
    ],
)
def test_every_report_has_a_finite_score_and_the_worst_if_it_has_none(metrics, expected):
    before = dict(metrics)
    assert with_score(metrics, "loss", -MOST) == expected
    assert metrics.keys() == before.keys()


def test_a_score_is_found_where_ray_finds_it_in_nested_metrics():
    assert with_score({"a": {"b": {"c": math.nan}}}, "a/b/c", MOST) == {"a": {"b": {"c": MOST}}}
    assert with_score({"a/b": {"c": 2}}, "a/b/c", MOST) == {"a/b": {"c": 2}}
    assert with_score({"a": {"b": 1}}, "a/c", MOST) == {"a": {"b": 1}, "a/c": MOST}


def test_a_score_that_is_no_number_is_refused_by_name():
    with pytest.raises(ValueError, match=r"metric 'loss' is 'low'; .* so give a number"):
        with_score({"loss": "low"}, "loss", MOST)
