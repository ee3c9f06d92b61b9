# SPDX-License-Identifier: Apache-2.0
"""The accountants: from an event to its privacy curve, one method a file."""
