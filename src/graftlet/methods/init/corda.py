# SPDX-License-Identifier: Apache-2.0
"""CorDA: directions that matter for given data (arXiv 2406.05223).   U S V^T = W C, A = sqrt(S / s) V^T C^-1, B = U sqrt(S / s)

C is the damped covariance of the layer's inputs. The instruction-previewed mode (`ipm`) trains the first r directions, the
knowledge-preserved one (`kpm`) the last r, which the data does not use. The base keeps W - s B A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.method import View
from ...errors import ConfigError
from ...weights.site import Linear, Site
from ..data.stream import check_all_seen, feed, keep, kept, linear_layers, rank_of, used, watching
from ..data.turns import ROOM, Record, Shown, can_be_seen_again, key_of, measured, progress, turns
from . import start
from .spectral import readable, without

DAMPING = 0.01
Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(kw_only=True)
class CordaConfig:
    """CorDA.

    Args:
        cache_file: keep the directions that were found here, and read them from here. covariance_file: the same for the
            covariances, which serve any rank.
        corda_method: "ipm" learns what the data uses; "kpm" learns beside it and preserves it.
        verbose: print each layer as it is done. use_float16_for_covariance: half the memory, less exact.
        prune_temporary_fields: kept for files of the format; nothing temporary is left in any case.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ConfigError(f"CordaConfig: corda_method={self.corda_method!r}; allowed: 'ipm', 'kpm'.")


@start(
    "corda",
    sites=(Linear,),
    rebases=True,
    bounded=True,
    needs="preprocess_corda(model, config, run_model), on the base model",
    before=lambda model, config, batches, shown: preprocess_corda(model, config, batches, show_progress_bar=shown),
)
def corda(p: View, A: Tensor, B: Tensor) -> Tensor:
    """The pair from the directions that `preprocess_corda` left on the layer."""
    U, S, V = (t.to(A.device) for t in kept(p.site, "corda"))
    if len(S) != p.r:
        raise ConfigError(
            f"{p.key!r} was prepared for rank {len(S)}, not {p.r}; run preprocess_corda with this config."
        )
    root = (S / p.scaling).sqrt()
    A.copy_(root[:, None] * V.T)
    B.copy_(U * root)
    rest = without(p, readable(p, "corda"), A, B)
    used(p.site, "corda")
    return rest


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Any = None,
    hooked_model: nn.Module | None = None,
    room: float = ROOM,
    show_progress_bar: Shown = False,
) -> None:
    """Find each linear layer's directions on data, and leave them on it for the start `corda`.

    Args:
        lora_config: which layers, at what rank; `corda_config` says how.
        run_model: a function that runs the model on the data, or the batches themselves. Not needed where
            `corda_config` names a file that is there. hooked_model: watch this model's layers of the same paths instead.
        room: bytes for covariances. Where those of all layers take more, the data is run through several times, for some
            layers each time; not where it can be seen but once, or where `covariance_file` is to hold them all.
        show_progress_bar: show how many layers are done; or a function that is told (see `Shown`).

    What was found before a kill is in `cache_file` with `.part` behind its name, and is not looked for again.
    """
    options = lora_config.corda_config or CordaConfig()
    sites = linear_layers(model, lora_config)
    ranks = {path: rank_of(lora_config, path) for path in sites}
    key = key_of(sites, start="corda", mode=options.corda_method, ranks=ranks)
    record = Record(options.cache_file, key, run_model)
    again = can_be_seen_again(run_model) and not options.covariance_file

    def measure(paths: list[str]) -> Iterator[dict[str, Triple]]:
        covariances = _covariances(model, {p: sites[p] for p in paths}, options, run_model, hooked_model)
        for path in paths:
            yield {path: _directions(sites[path], covariances.pop(path), ranks[path], options.corda_method)}
            if options.verbose:
                print(f"corda: {path}")

    groups = turns({p: 4 * site.features_in**2 for p, site in sites.items()}, room, again)
    with progress(hooked_model or model, len(sites), "corda: layers", show_progress_bar) as tell:
        found = measured(record, groups, measure, tell)
    for path, site in sites.items():
        keep(site, "corda", tuple(found[path]))


def _covariances(
    model: nn.Module, sites: dict[str, Site], options: CordaConfig, data: Any, hooked: nn.Module | None
) -> dict[str, Tensor]:
    """The mean of `(X / |max X|)^T (X / |max X|)` over a layer's calls."""
    key = key_of(sites, start="corda", half=options.use_float16_for_covariance)
    record = Record(options.covariance_file, key, data)
    if record.found:
        check_all_seen(sites, record.found)
        return dict(record.found)
    if data is None:
        raise ConfigError("preprocess_corda needs run_model: a function that runs the model on data, or batches of it.")
    sums: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    with watching({p: (hooked or model).get_submodule(p) for p in sites}, _adder(sums, calls, options)):
        feed(model, data)
    check_all_seen(sites, sums)
    means = {path: total.float() / calls[path] for path, total in sums.items()}
    record.add(means)
    return means


def _adder(sums: dict[str, Tensor], calls: dict[str, int], options: CordaConfig) -> Callable[[str, Tensor], None]:
    def take(path: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        rows = rows / rows.max().abs()
        if not rows.isfinite().all():
            raise ConfigError(f"the data makes NaN or Inf in the input of {path!r}; covariances cannot be taken of it.")
        new = rows.T @ rows
        new = new.half() if options.use_float16_for_covariance else new
        sums[path] = sums[path] + new if path in sums else new
        calls[path] = calls.get(path, 0) + 1

    return take


def _directions(site: Site, covariance: Tensor, rank: int, mode: str) -> Triple:
    """U, S and C^-1 V of the r directions that are to learn."""
    W = site.read()[0].float()
    C = covariance.to(W.device).float()
    C = C + DAMPING * C.diagonal().mean() * torch.eye(len(C), device=C.device)
    U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
    V = torch.linalg.solve(C, Vh.T)
    chosen = slice(0, rank) if mode == "ipm" else slice(len(S) - rank, None)
    return U[:, chosen].cpu(), S[chosen].cpu(), V[:, chosen].cpu()
