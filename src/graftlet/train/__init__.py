# SPDX-License-Identifier: Apache-2.0
"""Training: recipes over the transformers Trainer, and the callbacks they use.

from graftlet.train import load_recipe, train
result = train(load_recipe("examples/recipes/sms-spam.toml", ["output=runs/a"]))
"""

from __future__ import annotations

from ..names import placed

__getattr__, __dir__, __all__ = placed(
    __name__,
    {
        "train.recipe": "Recipe load_recipe",
        "train.run": "Result train",
        "train.adapter": "open_adapter",
        "train.use": "classify scores sentences",
        "train.callbacks": "Allocation RichProgress StopOnSignal",
        "train.trainer": "AdapterTrainer",
        "train.checkpoints": "AdapterCheckpoints",
        "train.batches": "Collator check_isolation pack",
        "train.tokens": "Encoder",
    },
)
