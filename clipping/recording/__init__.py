# SPDX-License-Identifier: Apache-2.0
"""The tape: what each layer saw and what reached it, one backward at a time."""
