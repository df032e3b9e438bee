# SPDX-License-Identifier: Apache-2.0
"""What starts that look at data share: running a model, watching what goes into its layers, keeping what was found."""
