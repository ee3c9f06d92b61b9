# SPDX-License-Identifier: Apache-2.0
"""How each operation of torch passes on what is known of the examples in a tensor."""
