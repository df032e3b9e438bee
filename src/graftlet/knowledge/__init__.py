# SPDX-License-Identifier: Apache-2.0
"""What is known about methods and models, as data and as tables made from it."""
