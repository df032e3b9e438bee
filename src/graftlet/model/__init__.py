# SPDX-License-Identifier: Apache-2.0
"""Whole models with adapters: `PeftModel`, its task classes, saving and loading, status, cards. Knows transformers."""
