# SPDX-License-Identifier: Apache-2.0
"""What a layer does with a weight (`site`) and how the weight is kept (`storage`). Torch only."""
