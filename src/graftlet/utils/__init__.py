# SPDX-License-Identifier: Apache-2.0
"""Names under which the reference has its helpers."""
