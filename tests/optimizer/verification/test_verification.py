"""Held-out verification on score vectors whose outcome is known."""

import numpy as np

from optimizer.job.sections import ConstraintSpec
from optimizer.verification.verdict import verify


def scores(n, wrong):
    values = np.ones(n)
    values[:wrong] = 0
    return tuple(values)


GROUPS = [str(i) for i in range(1000)]


def test_clear_cases_are_decided_and_figures_are_the_samples_own():
    verdicts = verify(
        scores(1000, 20),
        {"good": scores(1000, 21), "bad": scores(1000, 120)},
        GROUPS,
        ConstraintSpec(max_accuracy_drop=0.02),
        seed=0,
    )
    good, bad = verdicts
    assert good.accepted and not bad.accepted
    assert (good.accuracy, good.dense_accuracy, good.n_samples, good.images) == (0.979, 0.98, 1000, 1000)
    assert abs(bad.difference + 0.1) < 1e-12 and -0.13 < bad.difference_low < -0.1 < bad.difference_high < -0.08
    assert bad.mcnemar_p < 1e-20


def test_a_drop_below_the_limit_is_refused_while_its_bound_is_above():
    (verdict,) = verify(
        scores(1000, 0), {"plan": scores(1000, 15)}, GROUPS, ConstraintSpec(max_accuracy_drop=0.02), seed=0
    )
    assert abs(verdict.difference + 0.015) < 1e-12 and verdict.difference_low < -0.02 and not verdict.accepted


def test_more_finalists_make_the_bound_stricter():
    constraint = ConstraintSpec(max_accuracy_drop=0.02)
    (alone,) = verify(scores(1000, 0), {"plan": scores(1000, 10)}, GROUPS, constraint, seed=0)
    others = {f"other{i}": scores(1000, 10) for i in range(5)}
    together = verify(scores(1000, 0), {"plan": scores(1000, 10), **others}, GROUPS, constraint, seed=0)
    assert min(v.difference_confidence for v in together) == 0.95 == alone.difference_confidence
    assert min(v.difference_low for v in together) < alone.difference_low


def test_the_first_refusal_ends_holms_line():
    # Both bounds alone would pass at the plain level; the stronger fails at the corrected one, so both are refused.
    constraint = ConstraintSpec(max_accuracy_drop=0.0195)
    plans = {f"p{i}": scores(1000, 11) for i in range(3)}
    assert not any(v.accepted for v in verify(scores(1000, 0), plans, GROUPS, constraint, seed=0))
    (alone,) = verify(scores(1000, 0), {"p": scores(1000, 11)}, GROUPS, constraint, seed=0)
    assert alone.accepted


def test_images_not_questions_are_what_counts():
    constraint = ConstraintSpec(max_accuracy_drop=0.02)
    together = [str(i // 10) for i in range(1000)]
    (independent,) = verify(scores(1000, 0), {"p": scores(1000, 10)}, GROUPS, constraint, seed=0)
    (clustered,) = verify(scores(1000, 0), {"p": scores(1000, 10)}, together, constraint, seed=0)
    assert clustered.difference_low < independent.difference_low - 0.005
    assert clustered.accuracy_low < independent.accuracy_low


def test_min_accuracy_is_judged_on_the_lower_bound():
    constraint = ConstraintSpec(max_accuracy_drop=None, min_accuracy=0.97)
    (near,) = verify(scores(1000, 0), {"p": scores(1000, 28)}, GROUPS, constraint, seed=0)
    assert near.accuracy > 0.97 and not near.accepted
