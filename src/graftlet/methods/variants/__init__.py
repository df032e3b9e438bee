# SPDX-License-Identifier: Apache-2.0
"""Wrappers that turn a method into another."""
