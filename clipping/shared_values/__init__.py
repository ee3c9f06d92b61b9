# SPDX-License-Identifier: Apache-2.0
"""Values of a forward that serve all examples at once, and the gradients of each example for them."""
