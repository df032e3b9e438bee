# SPDX-License-Identifier: Apache-2.0
"""A layer's path in the model, from its name in a file: whole paths with `_` for `.`, and other names for the same layers.

Underscores stand in paths as well, so a name is no path by itself: it is looked up among those of the model's layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from torch import nn

from ...core.target import walk
from ...errors import AdapterFileError, listing

DEPTH = 3
"""The layers of one resolution in Stable Diffusion's own numbering: two with blocks, and one that changes the size."""


def placed(model: nn.Module, names: Iterable[str], origin: str) -> dict[str, tuple[str, nn.Module]]:
    """The path and the module of each name. Raises `AdapterFileError` for names of no layer, or of two."""
    known: dict[str, list[tuple[str, nn.Module]]] = {}
    for place in (p for p in walk(model) if p.bare._parameters):
        known.setdefault(place.path.replace(".", "_"), []).append((place.path, place.bare))
    found: dict[str, tuple[str, nn.Module]] = {}
    lost: list[str] = []
    for name in names:
        hits = next((known[flat] for flat in spellings(name) if flat in known), [])
        exact = [hit for hit in hits if hit[0] == name] or hits
        if len(exact) == 1:
            found[name] = exact[0]
        else:
            lost.append(name)
    twice = len(found) - len({path for path, _ in found.values()})
    if lost or twice:
        what = f"{listing(lost, 4)} ({len(lost)})" if lost else f"{twice} layers that have two names in it"
        raise AdapterFileError(
            f"{origin} is for another model than this {type(model).__name__}, which has no single layer for {what}. "
            "For a pipeline, give the part that the file is for: pipeline.unet, pipeline.text_encoder."
        )
    return found


def spellings(name: str) -> Iterator[str]:
    """A name with underscores alone, as it stands and as other versions of the model have it."""
    flat = name.replace(".processor.", ".").replace(".", "_")
    for one in (flat, _renumbered(flat)):
        yield one
        yield f"{one}_0"  # the output of attention, a list with dropout behind it
        yield f"text_model_{one}"
        yield one.removeprefix("text_model_")
        yield one.removeprefix("model_")


# Stable Diffusion XL's files number the blocks of the original network

Turn = Callable[[re.Match[str]], str]


def _renumbered(flat: str) -> str:
    """A name in the original network's numbering, in that of diffusers; any other as it is."""
    for pattern, turn in BLOCKS:
        if (match := re.match(pattern, flat)) is not None:
            return turn(match) + _inside(flat[match.end() :])
    return flat


def _down(match: re.Match[str]) -> str:
    number, kind = int(match[1]) - 1, int(match[2])
    block, layer = divmod(number, DEPTH)
    if layer == DEPTH - 1:
        return f"down_blocks_{block}_downsamplers_0"
    return f"down_blocks_{block}_{('resnets', 'attentions')[kind]}_{layer}"


def _up(match: re.Match[str]) -> str:
    block, layer = divmod(int(match[1]), DEPTH)
    return f"up_blocks_{block}_{('resnets', 'attentions')[int(match[2])]}_{layer}"


def _mid(match: re.Match[str]) -> str:
    return ("mid_block_resnets_0", "mid_block_attentions_0", "mid_block_resnets_1")[int(match[1])]


BLOCKS: tuple[tuple[str, Turn], ...] = (
    (r"input_blocks_0_0$", lambda _: "conv_in"),
    (r"input_blocks_(\d{1,3})_([01])(?=_)", _down),
    (r"output_blocks_(\d{1,3})_[12]_conv$", lambda m: f"up_blocks_{int(m[1]) // DEPTH}_upsamplers_0_conv"),
    (r"output_blocks_(\d{1,3})_([01])(?=_)", _up),
    (r"middle_block_([012])(?=_)", _mid),
    (r"time_embed_0$", lambda _: "time_embedding_linear_1"),
    (r"time_embed_2$", lambda _: "time_embedding_linear_2"),
    (r"label_emb_0_0$", lambda _: "add_embedding_linear_1"),
    (r"label_emb_0_2$", lambda _: "add_embedding_linear_2"),
    (r"out_2$", lambda _: "conv_out"),
)

INSIDE = {
    "_in_layers_2": "_conv1", "_out_layers_3": "_conv2", "_emb_layers_1": "_time_emb_proj",
    "_skip_connection": "_conv_shortcut", "_op": "_conv",
}  # fmt: skip


def _inside(rest: str) -> str:
    return INSIDE.get(rest, rest)
