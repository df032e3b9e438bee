# SPDX-License-Identifier: Apache-2.0
"""What a Python repository needs and what its lore is, read off its files: nothing of it is imported or run."""
