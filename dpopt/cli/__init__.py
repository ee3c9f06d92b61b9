# SPDX-License-Identifier: Apache-2.0
"""The command line: it parses, calls the library and renders; it computes nothing."""
