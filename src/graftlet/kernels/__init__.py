# SPDX-License-Identifier: Apache-2.0
"""Faster equal implementations of what methods do. Nothing here has to be there: without it, methods run as they say."""
