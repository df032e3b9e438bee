# SPDX-License-Identifier: Apache-2.0
"""The model card: `README.md` beside an adapter, with the metadata that the hub reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import TaskType
from ..errors import CardWarning, warn
from ..files import write_atomically

PIPELINES = {
    TaskType.CAUSAL_LM: "text-generation",
    TaskType.SEQ_CLS: "text-classification",
    TaskType.TOKEN_CLS: "token-classification",
    TaskType.QUESTION_ANS: "question-answering",
    TaskType.FEATURE_EXTRACTION: "feature-extraction",
    TaskType.SEQ_2_SEQ_LM: "text2text-generation",
}

BODY = """
# {title}

A {method} adapter{base}, trained with [Graftlet](https://pypi.org/project/graftlet/).

```python
from graftlet import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/folder")
```

The files are those of PEFT: `peft` and everything that reads its adapters loads them too.

### Framework versions

- Graftlet {version}
"""


def write(model: Any, folder: Path) -> None:
    """Write the card, or bring the metadata of one that is there up to date and leave its text alone.

    A card whose metadata cannot be read is left as it is, with a `CardWarning`: no card is worth losing an adapter for.
    """
    from huggingface_hub import ModelCard, ModelCardData

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    try:
        card = (
            ModelCard.load(path)
            if path.exists()
            else ModelCard.from_template(ModelCardData(), template_str=_fresh(model, folder))
        )
    except Exception as error:  # a person's file: whatever is wrong with it, it stays
        warn(CardWarning, f"{path} was left as it is; its metadata cannot be read: {error}")
        return
    for key, value in metadata(model).items():
        setattr(card.data, key, value)
    write_atomically(path, str(card).encode())


def metadata(model: Any) -> dict[str, object]:
    """What the hub reads off a card: library, base, task and tags."""
    config = model.active_peft_config
    base = config.base_model_name_or_path or ""
    tags = ["base_model:adapter:" + base, str(config.peft_type).lower()]
    found: dict[str, object] = {"base_model": base, "library_name": "peft"}
    if hasattr(model.get_base_model(), "config"):
        tags.append("transformers")
    if isinstance(config.task_type, TaskType):
        found["pipeline_tag"] = PIPELINES[config.task_type]
    return {**found, "tags": tags}


def _fresh(model: Any, folder: Path) -> str:
    from .. import __version__

    config = model.active_peft_config
    base = f" for `{config.base_model_name_or_path}`" if config.base_model_name_or_path else ""
    text = BODY.format(title=folder.resolve().name, method=str(config.peft_type), base=base, version=__version__)
    return "---\n{{ card_data }}\n---\n" + text
