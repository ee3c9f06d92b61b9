# SPDX-License-Identifier: Apache-2.0
"""Made-up records that take part by secret coins: where they lie, what they cost, what releases say of them."""
