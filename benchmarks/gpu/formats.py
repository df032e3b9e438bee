# SPDX-License-Identifier: Apache-2.0
"""Adapters on quantised layers, on a GPU: which of the back ends that are installed here keep what they promise.

    python benchmarks/gpu/formats.py [NAME ...]

One row a back end: its own call, what is read beside it, an adapter's output, gradients to the adapter and through the
layer, a merge that is read back or refused with nothing changed, and a merge into an ordinary layer. A row is `passed`,
`failed` with what was found, or `absent` with the package that it needs. The last line counts them; the exit code is that
of failures. The layers are those of the tests.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / part) for part in ("src", "")]

import graftlet  # noqa: E402
from graftlet.core.layer import AdaptedLayer  # noqa: E402
from graftlet.errors import MergeError  # noqa: E402
from graftlet.testing.benches import layers, perturb  # noqa: E402
from graftlet.weights.site import Site, site_of  # noqa: E402
from tests.quantised.formats import FORMATS, IN, OUT, Format  # noqa: E402

DEVICE = "cuda"
CLOSE = 0.02
"""How far outputs in half precision, or of 8-bit products, may be apart, relative to the largest."""


class Mismatch(Exception):
    """Something that was found otherwise than promised."""


def moved(layer: Any) -> nn.Module:
    """A layer on the GPU, where HQQ's do not follow `to`; products of 8-bit floats want a bias in half precision."""
    if type(layer).__name__ == "HQQLinear":
        return layer.cuda(DEVICE)
    if getattr(getattr(layer, "weight", None), "dtype", None) == torch.float8_e4m3fn:
        layer.bias.data = layer.bias.data.bfloat16()
    return layer.to(DEVICE)


def inputs(site: Site) -> Tensor:
    """An input in what the layer computes in; products of 8-bit floats give half precision."""
    dtype = torch.bfloat16 if site.weight.dtype == torch.float8_e4m3fn else site.dtype
    return torch.randn(1, 7, IN, device=DEVICE).to(dtype)


def adapted(layer: nn.Module) -> tuple[Any, AdaptedLayer, Tensor]:
    """A model of the layer with a LoRA that changes something, the wrapper, and an input."""
    model = graftlet.get_peft_model(nn.Sequential(layer), graftlet.LoraConfig(r=8, target_modules=["0"]))
    perturb(model)
    (host,) = layers(model).values()
    return model.train(), host, inputs(host.site)


def near(what: str, found: Tensor, meant: Tensor, limit: float = CLOSE) -> None:
    off = float((found.float() - meant.float()).abs().max() / meant.float().abs().max())
    if not off <= limit:
        raise Mismatch(f"{what} is off by {off:.2g}")


def reads(form: Format, layer: nn.Module) -> None:
    site: Site = site_of(layer)  # type: ignore[assignment]
    W, b = site.read()
    x = inputs(site)
    meant = nn.functional.linear(x.float(), W.float(), None if b is None else b.float())
    near("the call, beside what is read,", layer(x), meant, max(CLOSE, 2 * (form.call or 0)))


def acts(form: Format, layer: nn.Module) -> None:
    model, host, x = adapted(layer)
    with model.disable_adapter():
        base = model(x)
    near("the adapter's part", model(x).float() - base.float(), x.float() @ host.get_delta_weight("default").T, 0.05)


def learns(form: Format, layer: nn.Module) -> None:
    model, _, x = adapted(layer)
    model(x).float().square().mean().backward()
    bare = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum())]
    if bare:
        raise Mismatch(f"no gradient in {bare[0]}")


def leads_back(form: Format, layer: nn.Module) -> None:
    model, host, x = adapted(layer)
    x.requires_grad_(True)
    model(x).float().sum().backward()
    if x.grad is None:
        raise Mismatch("no gradient of the input")
    meant = host.merged_weight(["default"])[0].sum(0).expand_as(x)
    near("the input's gradient", x.grad, meant, 0.05)


def merges(form: Format, layer: nn.Module) -> None:
    model, host, x = adapted(layer)
    y, before = model(x), host.site.read()[0].clone()
    meant = host.merged_weight(["default"])[0]
    try:
        model.merge_adapter()
    except MergeError:
        if form.writes:
            raise
        near("the output after a refused merge", model(x), y, CLOSE / 10)  # kernels add up in any order
        return
    lost = float((host.site.read()[0].float() - meant).norm() / meant.norm())
    if lost > form.rounding:
        raise Mismatch(f"the merged weight is off by {lost:.2g}")
    model.unmerge_adapter()
    near("the weight after unmerging", host.site.read()[0], before, 0)


def unloads(form: Format, layer: nn.Module) -> None:
    model, _, x = adapted(layer)
    y = model(x)
    merged: Any = model.merge_and_unload(dequantize=True)
    near("the ordinary layer's output", merged(x.to(merged[0].weight.dtype)), y, max(CLOSE, 2 * (form.call or 0)))


CHECKS: list[Callable[[Format, nn.Module], None]] = [reads, acts, learns, leads_back, merges, unloads]


def row(form: Format) -> tuple[str, str]:
    """One back end's verdict, and what there is to say of it."""
    if form.missing:
        return "absent", form.missing
    done = []
    for check in CHECKS:
        if check is leads_back and form.back is not None:
            done.append(f"no gradient through it ({form.back})")
            continue
        torch.manual_seed(0)
        try:
            layer = moved(form.make(nn.Linear(IN, OUT)))
        except ImportError as error:
            return "absent", f"{error}".partition("\n")[0]
        try:
            check(form, layer)
        except (ImportError, NameError) as error:  # a kernel's function is not there if its package is not
            return "absent", f"{check.__name__}: {error}".partition("\n")[0]
        except Exception as error:
            return "failed", f"{check.__name__}: {type(error).__name__}: {error}".partition("\n")[0]
        done.append(check.__name__)
    return "passed", ", ".join(done)


def main(names: list[str]) -> int:
    warnings.simplefilter("ignore")
    device = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {device}\n\n| back end | | |\n|---|---|---|", flush=True)
    counts = {"passed": 0, "failed": 0, "absent": 0}
    for form in FORMATS:
        if not names or form.name in names:
            verdict, what = row(form)
            counts[verdict] += 1
            print(f"| {form.name} | {verdict} | {what} |", flush=True)
    print("\n" + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return counts["failed"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
