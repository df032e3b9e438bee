# SPDX-License-Identifier: Apache-2.0
"""A row of `methods.py` that trains several adapters, each on a slice of the data, and routes among them: Arrow.

The slices make up the data that any other row is trained on, so all see as much of it. With `general`, one more adapter
learns to write the slices' questions and not their answers, and is what is subtracted from the experts (GenKnowSub).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graftlet.methods.variants.arrow import ArrowConfig
from graftlet.model.arrow import create_arrow_model
from graftlet.train import train
from graftlet.train.base import load_base, load_tokenizer, pick_device
from graftlet.train.batches import Collator
from graftlet.train.data import Example, load_splits
from graftlet.train.prepare import SUMMARY, prepare_data
from graftlet.train.recipe import Recipe, check
from graftlet.train.score import Scorer
from graftlet.train.sources import model_folder
from graftlet.train.trainer import AdapterTrainer, training_arguments

ASKED = "Write a question."
"""What a general adapter is asked."""


def routed(values: dict[str, Any]) -> None:
    """Carry out a recipe with `experts` beside its tables, and write its `summary.json`."""
    own = values.pop("routed")
    output = Path(values["output"])
    whole = check({**values, "output": str(output / "data")})
    pieces = sliced(whole, own["experts"], own["general"], output)
    paths, parts = [], []
    for i, (name, data) in enumerate(pieces.items()):
        path = output / name
        apart = {"seed": whole.seed + i}  # from one seed all begin with the same A, which a subtraction would take away
        parts.append(train(check({**values, **apart, "data": data, "output": str(path)})).summary)
        paths.append(str(path))
    count = own["experts"]
    base = load_base(model_folder(whole.model.source, print), whole.model, whole.quantization)
    config = ArrowConfig(**own["router"], use_gks=own["general"])
    model = create_arrow_model(base, paths[:count], config, paths[count:])
    summary = {**parts[0], "measured": measured(model, whole), **summed(parts)}
    (output / SUMMARY).write_text(json.dumps(summary))


def sliced(recipe: Recipe, experts: int, general: bool, folder: Path) -> dict[str, dict[str, Any]]:
    """The `[data]` of each adapter, by its name: as the recipe's, of a slice of what it trains on, in files in `folder`."""
    splits = load_splits(recipe.data, recipe.seed, recipe.folder)
    slices = {f"expert_{i}": splits.train[i::experts] for i in range(experts)}
    if general:
        slices["general"] = [asking(example) for example in splits.train]
    kept = recipe.data.model_dump(include={"max_length", "chat"})
    held = {f"{n}_source": str(written(folder / f"{n}.jsonl", getattr(splits, n))) for n in ("validation", "test")}
    return {
        name: {**kept, **held, "source": str(written(folder / f"{name}.jsonl", part)), "dedupe": False}
        for name, part in slices.items()
    }


def asking(example: Example) -> Example:
    """An example whose answer is the question of another one."""
    *before, question, _ = example.messages
    asked = {"role": "user", "content": ASKED}, {"role": "assistant", "content": question["content"]}
    return Example((*before, *asked))


def written(file: Path, examples: Sequence[Example]) -> Path:
    """Examples in a file that a recipe reads."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps({"messages": e.messages, "gold": e.gold}) for e in examples))
    return file


def measured(model: Any, recipe: Recipe) -> list[dict[str, Any]]:
    """How the base does on what the recipe holds out, and how the routed model."""
    data = prepare_data(recipe, load_tokenizer(model_folder(recipe.model.source, print), recipe.model))
    scorer = Scorer(data.encoder, data.held_out[recipe.evaluation.on], recipe.evaluation)
    args = training_arguments(recipe, pick_device(recipe.model.device), 1)
    collate = Collator(data.encoder.tokenizer.pad_token_id)
    trainer: Any = AdapterTrainer(model=model, args=args, data_collator=collate, eval_dataset=data.validation)
    with model.disable_adapter(), torch.no_grad():
        before = {"metric": scorer(model).value, "validation_loss": trainer.evaluate()["eval_loss"]}
    return [before, {"metric": scorer(model).value, "validation_loss": trainer.evaluate()["eval_loss"]}]


def summed(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all the adapters took together."""
    first = parts[0]
    return {
        "adapter": {
            "method": first["adapter"]["method"],
            **{name: sum(p["adapter"][name] for p in parts) for name in ("bytes", "trainable")},
        },
        "seconds": {"train": sum(p["seconds"]["train"] for p in parts)},
        "training": {
            "peak_memory": max(p["training"]["peak_memory"] for p in parts),
            "steps": sum(p["training"]["steps"] for p in parts),
        },
    }
