# SPDX-License-Identifier: Apache-2.0
"""The one idea, written once: `transform(p, W, b) -> (W', b')`, and what follows from it. Knows no method by name."""
