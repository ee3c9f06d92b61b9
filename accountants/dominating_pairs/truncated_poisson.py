# SPDX-License-Identifier: Apache-2.0
"""The slip of a truncated Poisson sample: the delta that cutting too large a sample costs besides.

Let U be how many of the *other* records the Poisson coins choose, the same in D and D'. If U < m, nothing
is cut whether the record in question is chosen or not: given the chosen ones, that is the Poisson step. So
M(D) = (1-k) G(D) + k B(D) and M(D') = (1-k) G(D') + k B(D'), with one k = P[U >= m], G, G' dominated by the Poisson
pair of curve H, and B, B' alike unless the record is drawn: at total variation <= q. By joint convexity the curve
of the step is at most (1-k) H + k q for e >= 0, and (1-k) H + k (1 - exp(e)) + exp(e) k q for e <= 0; since H >= 1 - exp(e),
both are at most (1-kq) H + kq, the curve of the Poisson pair with the mass kq moved to infinity. T steps:
delta(e) <= T k q + delta_Poisson(e). There is no factor 1 + exp(e), as there would be for comparing the cut step with the
uncut one in D and again in D'. U is binomial over at most n - 1 records, and k grows with n.
"""

from scipy.special import betainc

from accountants.events import TruncatedPoisson


def overflow(event: TruncatedPoisson) -> float:
    """Return q P[Binomial(num_records - 1, q) >= max_batch_size], the slip of one step, rounded up.

    It is the probability that a given record is drawn in a sample too large to be kept whole.
    """
    others, least = event.num_records - 1, event.max_batch_size
    if least > others:
        return 0.0
    if event.sampling_rate == 1:
        return 1.0
    # an upper tail of the binomial is a lower one of the beta law
    tail = float(betainc(least, others - least + 1, event.sampling_rate))
    return min(1.0, max(event.sampling_rate * tail * (1 + 1e-9), 1e-300))
