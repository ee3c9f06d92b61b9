# SPDX-License-Identifier: Apache-2.0
"""P-values of what independent normal numbers would give."""

import numpy as np
from scipy import stats


def p_of_shape(z):
    return stats.kstest(z, "norm").pvalue


def p_of_scale(z):
    return 2 * min(stats.chi2.cdf(np.square(z).sum(), z.size), stats.chi2.sf(np.square(z).sum(), z.size))


def p_of_mean(z):
    return 2 * stats.norm.sf(abs(z.mean()) * np.sqrt(z.size))


def p_of_correlation(a, b):
    return 2 * stats.norm.sf(abs(np.vdot(a, b)) / np.sqrt(a.size))
