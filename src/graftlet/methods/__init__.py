# SPDX-License-Identifier: Apache-2.0
"""The methods, one file each. They never import each other; each registers itself by `@method`."""
