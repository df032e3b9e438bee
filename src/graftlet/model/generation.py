# SPDX-License-Identifier: Apache-2.0
"""Generation with a prompt: transformers' own, on a stand-in whose every step is a call with the prompt in it.

The stand-in has the base's class and tensors and a forward of its own. So ids, lengths and whatever looks at them are the
caller's, with a cache or without one; nothing is set on the base, whatever happens; and threads do not meet.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any, TypeVar

from torch import Tensor, nn

from ..errors import CallError
from . import prompted

M = TypeVar("M", bound=nn.Module)

GUESSING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""Ways to generate that cut guessed tokens off the cache again, counting the caller's tokens alone."""


def generate(model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The base's `generate`, with the active prompt in it. It returns what the base would: no token of the prompt."""
    base = model.base_model
    own = prompted.taken(model, kwargs)
    if model._prompt_off or not prompted.acting(model):
        return base.generate(*args, **kwargs)
    setting = kwargs.get("generation_config") or base.generation_config
    for name in GUESSING:
        if (kwargs.get(name) or getattr(setting, name, None)) is not None:
            raise CallError(f"{name} does not go together with {model.peft_type}, which puts tokens of its own first.")

    def step(*args: Any, **given: Any) -> Any:
        return prompted.call(model, args, {**given, **repeated(own, given)})

    stand = stand_in(base, step)
    if prompted.is_seq2seq(model) and not prompted.in_cache(model):
        _stand_in_encoder(model, stand, own)
    return stand.generate(*args, **kwargs)


def _stand_in_encoder(model: Any, stand: Any, own: dict[str, Any]) -> None:
    """Generation runs the encoder by itself, so that the prompt must come in there."""
    encoder = model.base_model.get_encoder()

    def encode(**given: Any) -> Any:
        prompted.grown_input(model, given, repeated(own, given))
        return encoder(**given)

    within = stand_in(encoder, encode)
    stand.__dict__["get_encoder"] = lambda *args, **kwargs: within


def repeated(own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given a prompt, as often as generation repeats it for beams and several answers."""
    if not own:
        return own
    first = next(v for n in ("input_ids", "inputs_embeds", "decoder_input_ids") if (v := given.get(n)) is not None)
    times = {n: len(first) // max(len(v), 1) for n, v in own.items() if isinstance(v, Tensor) and v.dim()}
    return {n: v.repeat_interleave(times[n], 0) if times.get(n, 1) > 1 else v for n, v in own.items()}


def stand_in(module: M, forward: prompted.Run) -> M:
    """A module with the class, the tensors and the modules of another, and a forward of its own."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[hooks] = OrderedDict()  # they run around the module's own call
    twin.__dict__["_compiled_call_impl"] = None
    twin.__dict__["forward"] = functools.wraps(module.forward)(forward)  # with the signature that is looked at
    return twin
