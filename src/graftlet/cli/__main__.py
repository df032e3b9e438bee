# SPDX-License-Identifier: Apache-2.0
"""`python -m graftlet.cli`: the command, for launchers that start a module: `torchrun -m graftlet.cli train RECIPE.toml`."""

from . import main

main()
