# SPDX-License-Identifier: Apache-2.0
"""Do examples stay apart? Asked once at construction, and again while a run goes on."""
