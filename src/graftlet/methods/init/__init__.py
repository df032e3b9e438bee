# SPDX-License-Identifier: Apache-2.0
"""How adapters start: functions of a layer's view and its factors."""
