# SPDX-License-Identifier: Apache-2.0
"""Whole transcripts of a step with hidden state, simulated, with their exact likelihood ratios.

One pair of datasets in one dimension: D' has a record that D lacks. At step t the record takes part with probability
`rate` (a fresh coin) and its gradient has the sign `sign(history)`; the output is `transition(state, coin, sign)[0]`
plus noise, the next state its second value. The state of D goes on with coin 0, known to all; that of D' is hidden and
filtered exactly, over all values that it can have. N runs, S states.

- `Pair` says which mechanism, `losses` draws N transcripts under D' or D and returns log dP'/dP of each, shape (N,);
- `replaced_losses` does so where D has a record too, of the other sign: both states are hidden and filtered;
- `delayed_losses` where each step has a coordinate of its own, and another in which its residual is fed back;
- `hockey_stick` turns losses into delta at an epsilon, with a standard error and a bound that holds with confidence;
- `dice` and `official` are transitions: error feedback as stated, and as the official code retains it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

CONFIDENCE = math.log(2e6)  # a one-sided error of 1e-6


@dataclass(frozen=True, slots=True)
class Pair:
    """Steps, sampling rate, noise std, transition, state at the start, and the sign of a gradient given the past.

    `sign(t, outputs)` maps the outputs so far, shape (N, t), less those of D without noise, to +1 or -1, shape (N,).
    """

    steps: int
    rate: float
    sigma: float
    transition: Callable
    start: float = 0.0
    sign: Callable | None = None


def clip(value, bound):
    return np.clip(value, -bound, bound)


def dice(threshold, feedback, residual):
    """Clipped gradients of norm `threshold`, feedback clipped to `feedback`, residuals of norm `residual`."""

    def transition(state, coin, sign):
        fed = clip(state, feedback)
        return coin * sign * threshold + fed, state + coin * sign * residual - fed

    return transition


def official(threshold, feedback, residual):
    """As the official code retains its error: min(C2 / |e|, 1 - min(1, C2 / |e|)) e."""

    def transition(state, coin, sign):
        size = np.maximum(np.abs(state), 1e-300)
        share = np.minimum(1.0, feedback / size)
        kept = np.minimum(feedback / size, 1 - share) * state
        return coin * sign * threshold + share * state, kept + coin * sign * residual

    return transition


def reachable(pair):
    """The values of the hidden state before each step, ascending, for all coins and signs."""
    levels = [np.array([pair.start])]
    signs = (1.0,) if pair.sign is None else (1.0, -1.0)
    for _ in range(pair.steps):
        after = [pair.transition(levels[-1], coin, sign)[1] for coin in (0.0, 1.0) for sign in signs]
        levels.append(np.unique(np.concatenate(after).round(9)))
    return levels


def _move(pair, states, after, coin, sign):
    """Means (S,) and the places (S,) of the next states among `after`."""
    mean, following = pair.transition(states, coin, sign)
    places = np.clip(np.searchsorted(after, following - 1e-7), 0, len(after) - 1)
    np.testing.assert_allclose(after[places], following, atol=1e-7)
    return mean, places


def losses(pair, runs, *, present, rng):
    """Log likelihood ratios of `runs` whole transcripts, drawn under D' (`present`) or under D."""
    levels = reachable(pair)
    total, outputs = np.zeros(runs), np.zeros((runs, pair.steps))
    weights, truth, without = np.ones((runs, 1)), np.zeros(runs, dtype=int), np.array([pair.start])
    for t in range(pair.steps):
        sign = np.ones(runs) if pair.sign is None else pair.sign(t, outputs[:, :t])
        base, without = pair.transition(without, 0.0, 1.0)
        coins = (rng.random(runs) < pair.rate).astype(float)
        noise = rng.normal(0, pair.sigma, runs)
        seen, next_weights, next_truth = noise + base, np.zeros((runs, len(levels[t + 1]))), truth.copy()
        for at in np.unique(sign):
            rows = np.flatnonzero(sign == at)
            moves = [_move(pair, levels[t], levels[t + 1], coin, at) for coin in (0.0, 1.0)]
            if present:
                for coin, (mean, places) in zip((0.0, 1.0), moves, strict=True):
                    mine = rows[coins[rows] == coin]
                    seen[mine] = noise[mine] + mean[truth[mine]]
                    next_truth[mine] = places[truth[mine]]
            for chance, (mean, places) in zip((1 - pair.rate, pair.rate), moves, strict=True):
                near = ((seen[rows] - base) ** 2)[:, None] - (seen[rows][:, None] - mean) ** 2
                joint = chance * weights[rows] * np.exp(near / 2 / pair.sigma**2)
                np.add.at(next_weights, (rows[:, None], places[None, :]), joint)
        factor = next_weights.sum(axis=1)
        total += np.log(factor)
        weights, truth, outputs[:, t] = next_weights / factor[:, None], next_truth, seen - base
    return total


def _drawn(pair, runs, sign, rng):
    """Outputs, shape (N, steps), where the record has the sign `sign` throughout."""
    state, outputs = np.full(runs, pair.start), np.zeros((runs, pair.steps))
    for t in range(pair.steps):
        coins = (rng.random(runs) < pair.rate).astype(float)
        mean, state = pair.transition(state, coins, sign)
        outputs[:, t] = mean + rng.normal(0, pair.sigma, runs)
    return outputs


def _log_likelihood(pair, levels, outputs, sign):
    """The log density of whole transcripts, up to a constant, shape (N,)."""
    total, weights = np.zeros(len(outputs)), np.zeros((len(outputs), len(levels[0])))
    weights[:, np.searchsorted(levels[0], pair.start)] = 1.0
    for t in range(pair.steps):
        after = np.zeros((len(outputs), len(levels[t + 1])))
        for coin, chance in ((0.0, 1 - pair.rate), (1.0, pair.rate)):
            mean, places = _move(pair, levels[t], levels[t + 1], coin, sign)
            joint = chance * weights * np.exp(-((outputs[:, t, None] - mean) ** 2) / 2 / pair.sigma**2)
            np.add.at(after, (np.arange(len(outputs))[:, None], places[None, :]), joint)
        factor = after.sum(axis=1)
        total += np.log(factor)
        weights = after / factor[:, None]
    return total


def replaced_losses(pair, runs, rng):
    """Log dP'/dP of `runs` transcripts under D', whose record has the sign 1 where that of D has -1."""
    levels = reachable(replace(pair, sign=lambda t, outputs: None))
    outputs = _drawn(pair, runs, 1.0, rng)
    there, here = (_log_likelihood(pair, levels, outputs, sign) for sign in (1.0, -1.0))
    return there - here


def delayed_losses(pair, residuals, runs, rng):
    """As `replaced_losses`: gradients 1 and -1, residuals (of D', of D) each fed back whole in the step that follows.

    Every coin speaks in two coordinates only, its gradient's and its residual's, so that the ratio is a product. The
    last residual is never fed back. The transition is not used.
    """
    coins = rng.random((runs, pair.steps)) < pair.rate
    seen = coins + rng.normal(0, pair.sigma, coins.shape)
    fed = residuals[0] * coins + rng.normal(0, pair.sigma, coins.shape)
    heard = np.arange(pair.steps) < pair.steps - 1

    def ratio(sign, residual):
        near = (seen - sign / 2) * sign + heard * (fed - residual / 2) * residual
        return np.log(1 - pair.rate + pair.rate * np.exp(near / pair.sigma**2))

    return (ratio(1.0, residuals[0]) - ratio(-1.0, residuals[1])).sum(axis=1)


def hockey_stick(values, epsilon):
    """delta at `epsilon` from losses under their own law: the mean, and how far below it the truth may lie.

    The bound is Maurer, Pontil 2009 (arXiv:0907.3740, theorem 4): it holds except with probability 1e-6.
    """
    lost = np.maximum(-np.expm1(epsilon - values), 0.0)
    n = len(lost)
    margin = math.sqrt(2 * lost.var(ddof=1) * CONFIDENCE / n) + 7 * CONFIDENCE / 3 / (n - 1)
    return float(lost.mean()), margin
