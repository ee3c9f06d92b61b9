# SPDX-License-Identifier: Apache-2.0
"""What is tried together holds together; the verdict and its exit code; the controls; the report."""

import json
import math

import numpy as np
import pytest

from dpopt.audit import Evidence, LowerBound
from dpopt.audit.bounds.battery import first_of_each, lower_bounds, of_many_runs
from dpopt.audit.bounds.families import GAUSSIAN, gaussian_covers
from dpopt.audit.reports.audit_plots import bounds_picture, scores_picture
from dpopt.audit.reports.audit_report import AuditReport, to_html
from dpopt.audit.reports.controls import Control, negative, noise, positive, power, redrawn, released
from dpopt.audit.reports.verdict import Claim, rounded_down, verdict
from tests.support.dpopt.draws import allowed, gaussian, mu_of

DELTA = 1e-5


def loss_like(rng, m, mu):
    one = gaussian(rng, m, mu)
    return Evidence(one.scores, one.included, "loss")


def bound(epsilon, could=math.inf, name="made"):
    return LowerBound(name, epsilon, DELTA, 0.95, ("assumed",), could, "seen")


CLAIM = Claim(4.0, DELTA, "pld", ("assumed",))
SEEN = Control("positive", "released coins", True, "")


def test_guarantee_the_largest_of_all_bounds_holds_at_the_stated_confidence():
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(1000):
        one = gaussian(rng, 200, mu_of(1.0))
        alarms += max(b.epsilon for b in lower_bounds((one,), DELTA, family=GAUSSIAN)) > 1.0
    assert alarms <= allowed(1000)


def test_guarantee_a_true_claim_is_refuted_no_more_often_than_stated():
    rng = np.random.default_rng(1)
    refuted = 0
    for _ in range(500):
        bounds = lower_bounds((gaussian(rng, 200, mu_of(4.0)),), DELTA, 0.9, family=GAUSSIAN)
        refuted += verdict(CLAIM, bounds, (SEEN,), 0.9).exit_code == 1
    assert refuted <= allowed(500, 0.1)


def test_what_is_tried_follows_from_what_the_evidence_is():
    rng = np.random.default_rng(2)
    known = gaussian(rng, 100, 1.0)
    steps = Evidence(known.scores, known.included, "steps", True, 1.0, 10, 0.5)
    names = [b.name for b in lower_bounds((known, steps), DELTA)]
    assert names[0] == "single steps, composed" and "full signal, recorded noise" in names
    black = [b.name for b in lower_bounds((loss_like(rng, 100, 1.0),), DELTA)]
    assert black == ["one run, trade-off curve", "one run, guesses"]
    spent = sum(1 - b.confidence for b in lower_bounds((known, steps), DELTA))
    assert spent == pytest.approx(0.05)
    with pytest.raises(ValueError, match="none"):
        lower_bounds((), DELTA)


def test_many_runs():
    rng = np.random.default_rng(3)
    runs = [(gaussian(rng, 50, mu_of(4.0)),) for _ in range(30)]
    pooled, bounds = of_many_runs(runs, DELTA)
    assert pooled[0].num_records == 1500 and 3.0 < max(b.epsilon for b in bounds) < 4.5
    black = [(loss_like(rng, 50, 3.0),) for _ in range(400)]
    pooled, bounds = of_many_runs(black, DELTA, family=GAUSSIAN)
    assert pooled[0].num_records == 400 and pooled[0].independent
    assert "error rates" in {b.name for b in bounds} and max(b.epsilon for b in bounds) > 4.0
    assert first_of_each([run[0] for run in black]).scores[7] == black[7][0].scores[0]
    with pytest.raises(ValueError, match="alike"):
        of_many_runs([runs[0], black[0]], DELTA)


@pytest.mark.parametrize(
    ("claim", "bounds", "controls", "code", "told"),
    [
        (CLAIM, [bound(3.0)], [SEEN], 0, "Not refuted"),
        (CLAIM, [bound(3.0), bound(4.00002)], [SEEN], 1, "4.00002 at delta 1e-05 (made); it claims at most 4.00000."),
        (CLAIM, [bound(math.inf)], [SEEN], 1, "infinity"),
        (CLAIM, [bound(1.0, could=1.9)], [SEEN], 3, "1.90 at most"),
        (CLAIM, [bound(1.0, could=3.4)], [SEEN], 0, "more than 3.40 could not have been shown"),
        (CLAIM, [bound(1.0)], [Control("positive", "a twin", False, "")], 3, "not detected"),
        (CLAIM, [bound(5.0)], [Control("positive", "a twin", False, "")], 1, "Refuted"),
        (CLAIM, [bound(0.1)], [SEEN, Control("power", "a leak", False, "shows 0.4")], 3, "a leak shows 0.4; audit with"),
        (CLAIM, [bound(5.0)], [SEEN, Control("negative", "other coins", False, "9 of 20")], 3, "No verdict"),
        (Claim(math.inf, DELTA, "pld", ()), [bound(9.0)], [SEEN], 0, "Nothing to refute"),
    ],
)  # fmt: skip
def test_verdicts(claim, bounds, controls, code, told):
    found = verdict(claim, bounds, controls, 0.95)
    assert found.exit_code == code and told in found.sentence and found.sentence.count(". ") == 0


def test_bounds_at_another_delta_are_refused():
    with pytest.raises(ValueError, match="delta"):
        verdict(Claim(4.0, 1e-6, "pld", ()), [bound(1.0)], [], 0.95)
    with pytest.raises(ValueError, match="delta"):
        verdict(CLAIM, [], [], 0.95)


def test_controls():
    rng = np.random.default_rng(4)
    one = gaussian(rng, 400, mu_of(4.0))

    def bounds(evidence):
        return lower_bounds(evidence, DELTA, family=GAUSSIAN)

    assert positive((one,), bounds, 4.0).passed
    assert not positive((one,), bounds, 4.0, twin=(redrawn(one, rng),)).passed
    assert negative((one,), bounds, 0.95).passed
    told = negative((one,), lambda _: (bound(1.0),), 0.95)
    assert not told.passed and told.observed.startswith("20 of 20")
    assert max(b.epsilon for b in bounds((redrawn(one, rng),))) < 0.3
    assert released(one).included is not one.scores and released(one).scores[one.included].min() > 90
    assert power((one,), bounds, 4.0, DELTA).passed
    assert not power((gaussian(rng, 20, 0.0),), bounds, 1.0, DELTA).passed
    steps = Evidence(one.scores, one.included, "steps", True, None, 10, 0.5)
    assert power((steps,), bounds, 4.0, DELTA).passed
    assert redrawn(steps, rng).num_included == one.num_included


@pytest.mark.parametrize(("factor", "passed"), [(1.0, True), (0.8, False), (1.25, False)])
def test_the_noise_is_compared_with_the_record(factor, passed):
    one = gaussian(np.random.default_rng(5), 2000, 1.0)
    other = Evidence(factor * one.scores, one.included, "dirac", True, 1.0)
    found = noise(other)
    assert found is not None and found.passed == passed
    assert noise(Evidence(one.scores, one.included, "dirac", True)) is None


def test_a_gaussian_covers_sampled_steps_and_not_randomised_response():
    from accountants import Gaussian, PoissonSampled, Repeated, accountant

    curve = accountant("pld").curve(Repeated(PoissonSampled(0.1, Gaussian(1.76)), 200))
    assert gaussian_covers(curve, curve.epsilon(DELTA), DELTA, 1000)
    assert not gaussian_covers(curve, curve.epsilon(DELTA) / 2, DELTA, 1000)
    assert not gaussian_covers(curve, math.inf, DELTA, 1000)


def report():
    rng = np.random.default_rng(6)
    evidence = (gaussian(rng, 300, mu_of(4.0)), loss_like(rng, 20, 0.0))
    bounds = lower_bounds(evidence, DELTA, family=GAUSSIAN)
    controls = (SEEN, Control("noise as recorded", "<odd>", False, "&"))
    return AuditReport(
        runs=("<run>",), claim=CLAIM, verdict=verdict(CLAIM, bounds, controls, 0.95), confidence=0.95, bounds=bounds,
        controls=controls, evidence=evidence, about={"slower": math.inf},
    )  # fmt: skip


def test_the_report_tells_all_and_escapes():
    made = report()
    data = json.loads(made.to_json())
    assert data["verdict"]["exit_code"] == 0 and len(data["lower_bounds"]) == len(made.bounds)
    assert (
        data["lower_bounds"][0]["largest_possible"] == "infinity"
        and data["evidence"][0]["num_records"] == 300
    )
    pictures = [scores_picture(one) for one in made.evidence]
    html = to_html(made, bounds_picture(made.claim, made.bounds), pictures)
    assert html.count("data:image/png;base64,") == 3 and "<run>" not in html and "&lt;run&gt;" in html
    for one in made.bounds:
        assert one.observed in html and rounded_down(one.epsilon) in html
    assert "://" not in html and ">NO<" in html


def test_odd_scores_have_pictures():
    infinite = Evidence([math.inf, -math.inf, 0.0], [True, False, True], "odd")
    same = Evidence([1.0, 1.0], [True, True], "same")
    assert all(scores_picture(one)[:4] == b"\x89PNG" for one in (infinite, same))
    claim = Claim(math.inf, DELTA, "pld", ())
    assert bounds_picture(claim, [bound(math.inf), bound(0.0, could=0.0)])[:4] == b"\x89PNG"
