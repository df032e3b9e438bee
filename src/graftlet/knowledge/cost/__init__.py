# SPDX-License-Identifier: Apache-2.0
"""What training an adapter takes, told before anything is loaded: parameters, memory by part, time, and what would help."""
