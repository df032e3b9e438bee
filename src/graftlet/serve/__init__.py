# SPDX-License-Identifier: Apache-2.0
"""Serving: adapters swapped in place, many of them from disk."""
