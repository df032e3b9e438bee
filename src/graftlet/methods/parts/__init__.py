# SPDX-License-Identifier: Apache-2.0
"""Mathematics that several methods share."""
