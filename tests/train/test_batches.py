# SPDX-License-Identifier: Apache-2.0
"""Packed examples do not see each other: the loss of each is what it is alone."""

from __future__ import annotations

import pytest
import torch

from graftlet.errors import ConfigError
from graftlet.train.batches import Collator, check_isolation, feature, pack, takes_ends
from graftlet.train.tokens import IGNORED, Encoded

from . import tiny


def some_rows(count: int = 7, longest: int = 19) -> list[Encoded]:
    made = torch.Generator().manual_seed(1)
    rows = []
    for i in range(count):
        ids = torch.randint(0, 256, (3 + (i * 5) % (longest - 3),), generator=made).tolist()
        rows.append(Encoded(ids, [IGNORED, *ids[1:]]))
    return rows


def losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of every token that has a label, in the order of the rows."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100
    )
    return each[labels != IGNORED]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_losses_are_those_of_each_example_alone(attention: str) -> None:
    model, collate, rows = tiny.model(attention).eval(), Collator(0), some_rows()
    packed = pack(rows, 40)
    assert len(packed) < len(rows)
    order = [r for f in packed for r in rows if _inside(r.input_ids, f["input_ids"])]
    alone = torch.cat([losses(model, collate([feature(r)])) for r in order])
    together = losses(model, collate(packed))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def _inside(part: list[int], whole: list[int]) -> bool:
    return any(whole[i : i + len(part)] == part for i in range(len(whole)))


def test_packing_keeps_every_token_and_the_length() -> None:
    rows = some_rows(20)
    packed = pack(rows, 32)
    assert all(len(f["input_ids"]) <= 32 for f in packed)
    assert sorted(t for f in packed for t in f["input_ids"]) == sorted(t for r in rows for t in r.input_ids)
    assert sum(f["position_ids"].count(0) for f in packed) == 20
    starts = [f["labels"][i] for f in packed for i, p in enumerate(f["position_ids"]) if p == 0]
    assert set(starts) == {IGNORED}


def test_padding() -> None:
    batch = Collator(9)([feature(Encoded([1, 2, 3], [-100, 2, 3])), feature(Encoded([4], [4]))])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_isolation_is_checked() -> None:
    batch = Collator(0)(pack(some_rows(4), 60))
    model = tiny.model().train()
    check_isolation(model, batch)
    assert model.training

    class Leaking(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **inputs: object) -> object:
            return model(input_ids=input_ids, use_cache=False)  # positions thrown away: plain causal attention

    with pytest.raises(ConfigError, match="packed examples see each other"):
        check_isolation(Leaking(), batch)


@pytest.mark.parametrize("packed", [False, True])
def test_logits_of_the_answers_alone_give_the_same_loss_and_gradients(packed: bool) -> None:
    rows = [Encoded(r.input_ids, [IGNORED] * (len(r.input_ids) - 2) + r.labels[-2:]) for r in some_rows(4)]
    features = pack(rows, 60) if packed else [feature(r) for r in rows[2:]]
    model = tiny.model().train()
    assert takes_ends(model)
    found = []
    for ends in (False, True):
        batch = Collator(0, ends)(features)
        model.zero_grad()
        out = model(**batch, use_cache=False)
        out.loss.backward()
        found.append((out.logits.shape[1], out.loss.detach(), [p.grad.clone() for p in model.parameters()]))
    (whole, loss, grads), (kept, same_loss, same_grads) = found
    assert kept < whole or packed
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same_grads, grads, rtol=1e-4, atol=1e-6)
