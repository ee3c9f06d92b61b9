# SPDX-License-Identifier: Apache-2.0
"""What `events.HiddenFeedback` costs a whole run: the least of three proven bounds, whichever accountant prices.

Lengths in units of C1; s noise, q rate, c = C2 / C1, R the bound on a residual, T steps, K ~ Binomial(T, q) how often
the record takes part. `rest` is what else was released, in any order between the steps.

1. **Step by step**: each step is the shifted pair of `accountants.dominating_pairs.feedback_step`, composed with the rest. Always; the only
   one that a filter uses, since it is proven given the outputs so far.
2. **The run, all coins of the record shown.** Given them, and given the outputs before step t, both laws of step t are
   Gaussians, |c_t| <= a_t + b_t apart with a_t <= 1 where it takes part, else 0, and b_t the difference of what is fed
   back. Clipping is a projection on a ball, so firmly non-expansive:
   |clip e - clip e'|^2 + |(e - clip e) - (e' - clip e')|^2 <= |e - e'|^2. With d_t = |e_t - e'_t|, that is
   b_t^2 <= d_t^2 - u_t^2, d_{t+1} <= u_t + R (or u_t, where it takes no part), u_t <= d_t <= R * (its turns so far):
   so sum b_t^2 <= R^2 sum_k (2k + 1) = (K R)^2. Also b_t <= 2c. Hence
   sum |c_t|^2 <= W = min((sqrt(K) + min(K R, 2c sqrt(T)))^2, K (1 + 2c)^2 + (T - K) (2c)^2) on every path.
   The logarithm of the likelihood ratio is then a Brownian motion B_u - u/2 stopped at some u <= W / s^2, and the stopped
   exp(B - u/2) is the conditional mean of the one at W / s^2: by Jensen it is below it in the convex order, so no
   divergence is above that of the Gaussian mu = sqrt(W) / s (as in the filter of Smith, Thakurta 2022, arXiv:2210.17520).
   The coins have one law in D and D': delta_2(e) = E_K[delta of the Gaussian mu_K at e] (joint convexity).
3. **The gradient amplified, then the feedback.** With a record added, removed or emptied: D lacks it, or has it empty.
   From D to D' by way of Q: all of D', but fed back is what D would have. D against Q: rest +
   `PoissonSampled(q, Gaussian(s))` (neither's hidden error has seen the record; its coins are fresh). Q against D': only
   b_t differs; as in 2 with W = min((K R)^2, T (2c)^2).

Where there is a rest, 2 goes by way of Q too: all of D', but the steps as in D. If P, Q are (e1, d1) close in both
directions and Q, P' are (e2, d2) close, then P, P' are (e1 + e2, max(d2 + exp(e2) d1, d1 + exp(e1) d2)) close: a triangle,
not an addition of Renyi orders. Every split is a bound; the best of a few is taken.

**A record replaced**, z in D by z' in D', under the same coins. 1 is the Gaussian of distance 2 + 2c. 2 holds with
a_t <= 2 and residuals that differ by 2R: W = min((2 sqrt(K) + min(2 K R, 2c sqrt(T)))^2, K (2 + 2c)^2 + (T - K) (2c)^2).
3 must go by way of two, P and Q, whose hidden errors have seen neither z nor z'. D against P, which has z: only b_t
differs, W as in 3. P against Q, which has z': rest + `PoissonSampled` at its price under that relation. Q against D': as
the first. Three legs, (e2, d2), (e1, d1), (e2, d2) close in both directions, are
(e1 + 2 e2, d2 + exp(e2) d1 + exp(e1 + e2) d2) close. Two legs would not do: where what D feeds back is kept while z
becomes z', it tells which turns the record took, and their gradients are not sampled any more
(test_what_a_replaced_record_fed_back_tells_its_coins).

Steps may share an error if they differ at most in their rate (`events.HiddenFeedback`): K and T are then sums. Other
steps have an error of their own, so their W add; but steps whose residuals nothing bounds may share one whatever else
they differ in: each b_t <= 2c, once the record has taken part in any. Equal steps of errors apart are covered:
(sum K R)^2 is above the sum of (K R)^2, and T (2c)^2 adds.
"""

from collections import Counter
from dataclasses import dataclass, replace

from accountants.curve import Accountant, Bound, Curve, check_count, check_delta, check_epsilon
from accountants.dominating_pairs.feedback_mixture import Chain, Runs, chained_delta, chained_epsilon, mixture
from accountants.events import Composed, Event, Gaussian, HiddenFeedback, PoissonSampled, Repeated
from accountants.nests import leaves
from accountants.relations import REPLACE, require_charged_under

HIDDEN_FEEDBACK = "hidden feedback: the clipped gradient is amplified by sampling, what is fed back is not"
BOUNDED_RESIDUAL = (
    "hidden feedback: each residual is bounded as stated, and an error is shared only by steps that are equal but for "
    "their rates"
)


@dataclass(frozen=True, slots=True)
class FeedbackCurve:
    """A composition with hidden feedback: the least of the bounds of the module docstring.

    `direct` prices everything step by step, `amplified` without what is fed back, `rest` without the steps of `runs`.

    Guarantees
    ----------
    Never below the truth (module docstring; test_guarantee_hidden_feedback_covers_its_worst_pair,
    test_guarantee_hidden_feedback_covers_a_replaced_record), and never above `direct`. Closed under `+` with itself and with the plain curves of the same accountant, and under `*`.
    """

    direct: Curve
    amplified: Curve
    rest: Curve
    runs: Runs
    replaced: bool

    def __add__(self, other: Curve, /) -> "FeedbackCurve":
        if not isinstance(other, FeedbackCurve):
            parts = (self.direct + other, self.amplified + other, self.rest + other)
            return FeedbackCurve(*parts, self.runs, self.replaced)
        parts = (self.direct + other.direct, self.amplified + other.amplified, self.rest + other.rest)
        runs = Counter(dict(self.runs))
        runs.update(dict(other.runs))
        return FeedbackCurve(*parts, _sorted(runs), self.replaced)

    def __radd__(self, other: Curve, /) -> "FeedbackCurve":
        return self + other

    def __mul__(self, count: int, /) -> "FeedbackCurve":
        check_count(count)
        parts = (self.direct * count, self.amplified * count, self.rest * count)
        runs = tuple((leaf, n * count) for leaf, n in self.runs if count)
        return FeedbackCurve(*parts, runs, self.replaced)

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon >= 0 proven at `delta`."""
        return self.bound(delta).epsilon

    def delta(self, epsilon: float) -> float:
        """Return the smallest delta proven at `epsilon`."""
        check_epsilon(epsilon)
        found = self.direct.delta(epsilon)
        for chain, _ in self._chains():
            found = min(found, chained_delta(chain, epsilon, found))
        return found

    def bound(self, delta: float) -> Bound:
        """Return `epsilon(delta)` with its method and assumptions."""
        check_delta(delta)
        best = self.direct.bound(delta)
        why = (HIDDEN_FEEDBACK,) if self.runs else ()
        found = replace(best, assumptions=(*best.assumptions, *why))
        for chain, method in self._chains():
            value = chained_epsilon(chain, delta, found.epsilon)
            if value < found.epsilon:
                also = (*why, BOUNDED_RESIDUAL) if self._bounded else why
                found = Bound(value, delta, method, (*best.assumptions, *also))
        return found

    @property
    def _bounded(self) -> bool:
        return any(leaf.residual is not None for leaf, _ in self.runs)

    def _chains(self) -> list[tuple[Chain, str]]:
        """The bounds besides `direct`, with their names."""
        if not self.runs or not (self._bounded or self.rest.epsilon(0.0) == 0):
            return []  # the shifted pair is below the chain
        shown = Chain(self.rest, mixture(self.runs, True, self.replaced))
        chains = [(shown, "hidden feedback, coins shown")]
        if self._bounded:
            fed = Chain(self.amplified, mixture(self.runs, False, False), around=self.replaced)
            chains.append((fed, "hidden feedback, bounded residual"))
        return chains


@dataclass(frozen=True, slots=True)
class FeedbackPricing:
    """An accountant that prices hidden feedback by `FeedbackCurve`, and everything else as `rule` does."""

    rule: Accountant

    @property
    def name(self) -> str:
        """The name of the rule."""
        return self.rule.name

    @property
    def adaptive(self) -> bool:
        """Whether the curves of the rule may feed a filter; a filter takes the step-by-step bound."""
        return self.rule.adaptive

    @property
    def relation(self) -> str:
        """The relation of the rule."""
        return self.rule.relation

    def curve(self, event: Event) -> Curve:
        """Price `event`; raises `UnpricedEvent`, naming the leaf."""
        require_charged_under(event, self.relation)
        items = leaves(event)
        runs = tuple((leaf, n) for leaf, n in items if isinstance(leaf, HiddenFeedback))
        if not runs:
            return self.rule.curve(event)
        rest = tuple(Repeated(leaf, n) for leaf, n in items if not isinstance(leaf, HiddenFeedback))
        sampled = tuple(Repeated(_without_feedback(leaf), n) for leaf, n in runs)
        return FeedbackCurve(
            self.rule.curve(event),
            self.rule.curve(Composed((*rest, *sampled))),
            self.rule.curve(Composed(rest)),
            runs,
            self.rule.relation == REPLACE,
        )


def _without_feedback(leaf: HiddenFeedback) -> PoissonSampled:
    return PoissonSampled(leaf.sampling_rate, Gaussian(leaf.noise_multiplier))


def _sorted(runs: "Counter[HiddenFeedback]") -> Runs:
    return tuple(sorted(runs.items(), key=lambda item: repr(item[0])))
