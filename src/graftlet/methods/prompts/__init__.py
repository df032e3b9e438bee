# SPDX-License-Identifier: Apache-2.0
"""Methods that put something before the input, or into the cache, of a model that stays as it is."""
