# SPDX-License-Identifier: Apache-2.0
"""Lower bounds on epsilon from what an audit saw, a family a file."""
