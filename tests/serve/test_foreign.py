# SPDX-License-Identifier: Apache-2.0
"""Files of kohya's sd-scripts, LyCORIS and diffusers: each layer's change is what the formula of its trainer gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graftlet
from graftlet import LoraConfig, PeftModel, load_foreign
from graftlet.core.host import hosts
from graftlet.core.layer import AdaptedLayer
from graftlet.errors import AdapterFileError, CallError, ConversionError, GraftletError
from graftlet.testing.benches import snapshot


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 6), nn.ModuleList([nn.Linear(6, 8), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out[0](self.to_q(x).tanh())


class Unet(nn.Module):
    """Two blocks with underscores in their names, and convolutions of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.proj_in = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.down_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        h = self.proj_in(self.conv_in(x)).flatten(2).mT
        for block in self.down_blocks:
            h = block(h)
        return h


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def random(*shape: int) -> Tensor:
    return torch.randn(shape) / 2


def written(tensors: dict[str, Tensor], folder: Path, **metadata: str) -> Path:
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "foreign.safetensors", metadata or None)
    return folder / "foreign.safetensors"


def changes(model: Any) -> dict[str, Tensor]:
    return {h.keys["default"]: h.change("default")[0].detach() for _, h in hosts(model) if isinstance(h, AdaptedLayer)}


def kohya(layer: str, out: int, into: tuple[int, ...], r: int, alpha: float | None) -> dict[str, Tensor]:
    ones = [1] * (len(into) - 1)
    found = {f"{layer}.lora_down.weight": random(r, *into), f"{layer}.lora_up.weight": random(out, r, *ones)}
    return found if alpha is None else {**found, f"{layer}.alpha": torch.tensor(alpha)}


def product(t: dict[str, Tensor], layer: str, alpha: float | None) -> Tensor:
    down, up = t[f"{layer}.lora_down.weight"], t[f"{layer}.lora_up.weight"]
    return (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:]) * ((alpha or len(down)) / len(down))


def test_kohya_lora_on_linear_layers_and_convolutions(tmp_path: Path) -> None:
    t = {
        **kohya("lora_unet_down_blocks_0_to_q", 6, (8,), 2, 1.0),
        **kohya("lora_unet_down_blocks_1_to_out_0", 8, (6,), 4, None),
        **kohya("lora_unet_conv_in", 8, (3, 3, 3), 3, 1.5),
        **kohya("lora_unet_proj_in", 8, (8,), 2, 8.0),  # a 1x1 convolution, kept as a linear layer's
    }
    model = load_foreign(Unet(), written(t, tmp_path))
    found = changes(model)
    torch.testing.assert_close(
        found,
        {
            "down_blocks.0.to_q": product(t, "lora_unet_down_blocks_0_to_q", 1.0),
            "down_blocks.1.to_out.0": product(t, "lora_unet_down_blocks_1_to_out_0", None),
            "conv_in": product(t, "lora_unet_conv_in", 1.5),
            "proj_in": product(t, "lora_unet_proj_in", 8.0)[..., None, None],
        },
    )
    y = model(X)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(PeftModel.from_pretrained(Unet(), tmp_path / "saved")(X), y)
    assert (y - Unet()(X)).abs().max() > 0.1


def test_a_core_between_the_factors_is_folded_in(tmp_path: Path) -> None:
    name = "lora_unet_conv_in"
    t = {
        f"{name}.lora_down.weight": random(2, 3, 1, 1), f"{name}.lora_mid.weight": random(2, 2, 3, 3),
        f"{name}.lora_up.weight": random(8, 2, 1, 1), f"{name}.alpha": torch.tensor(4.0),
    }  # fmt: skip
    model = load_foreign(Unet(), written(t, tmp_path))
    down, mid, up = (t[f"{name}.lora_{n}.weight"].squeeze() for n in ("down", "mid", "up"))
    torch.testing.assert_close(changes(model)["conv_in"], 2 * torch.einsum("or,rskl,si->oikl", up, mid, down))


def test_dora_scales_each_output(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_to_q"
    t = {**kohya(name, 6, (8,), 2, 2.0), f"{name}.dora_scale": random(6, 1).abs() + 0.5}
    model = load_foreign(Unet(), written(t, tmp_path))
    W = Unet().down_blocks[0].to_q.weight.detach()
    adapted = W + product(t, name, 2.0)
    wanted = adapted * t[f"{name}.dora_scale"] / adapted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(W + changes(model)["down_blocks.0.to_q"], wanted)
    with pytest.raises(ConversionError, match="an input"):
        load_foreign(Unet(), written({**t, f"{name}.dora_scale": random(1, 8)}, tmp_path))


@pytest.mark.parametrize("cored", [False, True])
def test_loha(cored: bool, tmp_path: Path) -> None:
    linear, conv = "lora_unet_down_blocks_0_to_q", "lora_unet_conv_in"
    t = {f"{linear}.hada_w{n}_{k}": random(*s) for n in (1, 2) for k, s in (("a", (6, 2)), ("b", (2, 8)))}
    t[f"{linear}.alpha"] = torch.tensor(1.0)
    if cored:
        t.update({f"{conv}.hada_w{n}_{k}": random(*s) for n in (1, 2) for k, s in (("a", (2, 8)), ("b", (2, 3)))})
        t.update({f"{conv}.hada_t{n}": random(2, 2, 3, 3) for n in (1, 2)})
    else:
        t.update({f"{conv}.hada_w{n}_{k}": random(*s) for n in (1, 2) for k, s in (("a", (8, 2)), ("b", (2, 27)))})
    model = load_foreign(Unet(), written(t, tmp_path))

    def factor(layer: str, n: int) -> Tensor:
        a, b = t[f"{layer}.hada_w{n}_a"], t[f"{layer}.hada_w{n}_b"]
        if f"{layer}.hada_t{n}" in t:
            return torch.einsum("rskl,ro,si->oikl", t[f"{layer}.hada_t{n}"], a, b)
        return a @ b

    found = changes(model)
    torch.testing.assert_close(found["down_blocks.0.to_q"], 0.5 * factor(linear, 1) * factor(linear, 2))
    torch.testing.assert_close(found["conv_in"], (factor(conv, 1) * factor(conv, 2)).reshape(8, 3, 3, 3))


def test_lokr(tmp_path: Path) -> None:
    """8 is 2 x 4 and 6 is 2 x 3: the factor 2 for all; a thin W2 is scaled, two whole factors are not."""
    one, two = "lora_unet_down_blocks_0_to_q", "lora_unet_proj_in"
    t = {
        f"{one}.lokr_w1": random(2, 2), f"{one}.lokr_w2_a": random(3, 1), f"{one}.lokr_w2_b": random(1, 4),
        f"{one}.alpha": torch.tensor(3.0),
        f"{two}.lokr_w1": random(2, 2), f"{two}.lokr_w2": random(4, 4, 1, 1), f"{two}.alpha": torch.tensor(7.0),
    }  # fmt: skip
    model = load_foreign(Unet(), written(t, tmp_path))
    found = changes(model)
    thin = torch.kron(t[f"{one}.lokr_w1"], t[f"{one}.lokr_w2_a"] @ t[f"{one}.lokr_w2_b"])
    torch.testing.assert_close(found["down_blocks.0.to_q"], 3 * thin)
    whole = torch.kron(t[f"{two}.lokr_w1"], t[f"{two}.lokr_w2"].squeeze())
    torch.testing.assert_close(found["proj_in"].squeeze(), whole)


@pytest.mark.parametrize(
    "names",
    [
        "unet.down_blocks.0.to_q.lora_A.weight unet.down_blocks.0.to_q.lora_B.weight",
        "unet.down_blocks.0.to_q.lora.down.weight unet.down_blocks.0.to_q.lora.up.weight",
        "unet.down_blocks.0.processor.to_q_lora.down.weight unet.down_blocks.0.processor.to_q_lora.up.weight",
        "down_blocks.0.to_q.lora_linear_layer.down.weight down_blocks.0.to_q.lora_linear_layer.up.weight",
        "base_model.model.down_blocks.0.to_q.lora_A.weight base_model.model.down_blocks.0.to_q.lora_B.weight",
        "lycoris_down_blocks_0_to_q.lora_down.weight lycoris_down_blocks_0_to_q.lora_up.weight",
    ],
)
def test_every_way_of_naming(names: str, tmp_path: Path) -> None:
    down, up = names.split()
    t = {down: random(2, 8), up: random(6, 2)}
    model = load_foreign(Unet(), written(t, tmp_path))
    torch.testing.assert_close(changes(model), {"down_blocks.0.to_q": t[up] @ t[down]})


def test_the_output_of_old_attention_is_in_a_list(tmp_path: Path) -> None:
    name = "down_blocks.0.processor.to_out_lora"
    t = {f"{name}.down.weight": random(2, 6), f"{name}.up.weight": random(8, 2)}
    assert set(changes(load_foreign(Unet(), written(t, tmp_path)))) == {"down_blocks.0.to_out.0"}


def test_diffusers_tells_scalings_in_the_metadata(tmp_path: Path) -> None:
    t = {
        f"unet.down_blocks.{n}.to_q.lora_{k}.weight": random(*s)
        for n in (0, 1)
        for k, s in (("A", (2, 8)), ("B", (6, 2)))
    }
    told = {
        "unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"down_blocks.1.to_q": 1}, "unet.use_rslora": True,
        "unet.target_modules": ["to_q"], "text_encoder.lora_alpha": 100,
    }  # fmt: skip
    model = load_foreign(Unet(), written(t, tmp_path, lora_adapter_metadata=json.dumps(told)))
    for n, alpha in ((0, 6), (1, 1)):
        dW = t[f"unet.down_blocks.{n}.to_q.lora_B.weight"] @ t[f"unet.down_blocks.{n}.to_q.lora_A.weight"]
        torch.testing.assert_close(changes(model)[f"down_blocks.{n}.to_q"], dW * alpha / 2**0.5)
    with pytest.raises(AdapterFileError, match="no JSON object"):
        load_foreign(Unet(), written(t, tmp_path, lora_adapter_metadata="[1"))
    with pytest.raises(GraftletError, match="lora_alpha"):
        load_foreign(Unet(), written(t, tmp_path, lora_adapter_metadata='{"unet.lora_alpha": "many"}'))


def test_a_file_for_several_parts(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {
        "vocab_size": 16,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = CLIPTextConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    layer = "lora_te_text_model_encoder_layers_1_self_attn_q_proj"
    file = written({**kohya("lora_unet_proj_in", 8, (8,), 2, 2.0), **kohya(layer, 8, (8,), 2, 1.0)}, tmp_path)
    with pytest.raises(CallError, match="'text_encoder', 'unet'"):
        load_foreign(Unet(), file)
    with pytest.raises(CallError, match="'text_encoder_2'"):
        load_foreign(Unet(), file, component="text_encoder_2")
    assert set(changes(load_foreign(Unet(), file, component="unet"))) == {"proj_in"}
    text = load_foreign(CLIPTextModel(config), file, component="text_encoder")
    (path,) = changes(text)
    assert path.endswith("encoder.layers.1.self_attn.q_proj")


def test_beside_another_adapter(tmp_path: Path) -> None:
    model = load_foreign(Unet(), written(kohya("lora_unet_proj_in", 8, (8,), 2, 2.0), tmp_path), "first")
    y = model(X)
    again = load_foreign(model, written(kohya("lora_unet_conv_in", 8, (3, 3, 3), 2, 2.0), tmp_path), "second")
    assert again is model
    torch.testing.assert_close(model(X), y)
    model.set_adapter("second")
    assert (model(X) - y).abs().max() > 0.01


# files from strangers


GOOD = {"lora_unet_proj_in.lora_down.weight": torch.ones(2, 8), "lora_unet_proj_in.lora_up.weight": torch.ones(8, 2)}
Q = "lora_unet_down_blocks_0_to_q"
BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "nan": ({f"{Q}.lora_down.weight": torch.full((2, 8), torch.nan), f"{Q}.lora_up.weight": torch.ones(6, 2)}, "NaN"),
    "half a pair": ({f"{Q}.lora_down.weight": torch.ones(2, 8)}, "have no 'up'"),
    "another width": ({f"{Q}.lora_down.weight": torch.ones(2, 9), f"{Q}.lora_up.weight": torch.ones(6, 2)}, r"\(2, 8\)"),
    "two ranks": ({f"{Q}.lora_down.weight": torch.ones(2, 8), f"{Q}.lora_up.weight": torch.ones(6, 3)}, r"\(6, 2\)"),
    "a rank of nothing": (
        {f"{Q}.lora_down.weight": torch.ones(10**9, 0), f"{Q}.lora_up.weight": torch.ones(6, 0)},
        "of no rank",
    ),
    "no rank": ({f"{Q}.lora_down.weight": torch.ones(0, 8), f"{Q}.lora_up.weight": torch.ones(6, 0)}, "of no rank"),
    "a scalar": ({f"{Q}.lora_down.weight": torch.ones(()), f"{Q}.lora_up.weight": torch.ones(6, 2)}, "of no rank"),
    "many alphas": ({f"{Q}.lora_down.weight": torch.ones(2, 8), f"{Q}.alpha": torch.ones(3)}, "one number"),
    "an alpha of infinity": ({**GOOD, "lora_unet_proj_in.alpha": torch.tensor(torch.inf)}, "Inf"),
    "no such layer": (
        {"lora_unet_nowhere.lora_down.weight": torch.ones(2, 8), "lora_unet_nowhere.lora_up.weight": torch.ones(6, 2)},
        "nowhere",
    ),
    "a whole block": (
        {"lora_unet_down_blocks.lora_down.weight": torch.ones(2, 8), "lora_unet_down_blocks.lora_up.weight": torch.ones(6, 2)},
        "no single layer for down_blocks",
    ),
    "one layer twice": ({**GOOD, "unet.proj_in.lora_A.weight": torch.ones(2, 8)}, "two"),
    "a whole difference": ({f"{Q}.diff": torch.ones(6, 8)}, "no method that is read"),
    "only an alpha": ({f"{Q}.alpha": torch.tensor(1.0)}, "no method"),
    "two methods": ({**GOOD, f"{Q}.lokr_w1": torch.ones(2, 2), f"{Q}.lokr_w2": torch.ones(3, 4)}, "LoKr .* LoRA|LoRA .* LoKr"),
    "loha of another shape": (
        {f"{Q}.hada_w{n}_{k}": torch.ones(s) for n in (1, 2) for k, s in (("a", (6, 2)), ("b", (2, 9)))},
        r"\(2, 8\)",
    ),
    "lokr of no factor": ({f"{Q}.lokr_w1": torch.ones(5, 5), f"{Q}.lokr_w2": torch.ones(3, 4)}, "no one factor"),
    "lokr of nothing": ({f"{Q}.lokr_w1": torch.ones(0, 0), f"{Q}.lokr_w2": torch.ones(3, 4)}, "no one factor"),
    "more than lora": ({**GOOD, "lora_unet_proj_in.hada_t1": torch.ones(2, 2)}, "hada_t1"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_refused_and_change_nothing(what: str, tmp_path: Path) -> None:
    tensors, said = BAD[what]
    model = Unet()
    before, y = snapshot(model), model(X)
    with pytest.raises(GraftletError, match=said):
        load_foreign(model, written(tensors, tmp_path))
    assert all(torch.equal(t, before[n]) for n, t in snapshot(model).items())
    assert snapshot(model).keys() == before.keys()
    torch.testing.assert_close(model(X), y)


def test_nothing_but_safetensors_is_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
            return (pytest.fail, ("a pickle was run",))

    torch.save(Bomb(), tmp_path / "a.pt")
    with pytest.raises(AdapterFileError, match="no safetensors"):
        load_foreign(Unet(), tmp_path / "a.pt")
    (tmp_path / "a.pt").rename(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="cannot be read"):
        load_foreign(Unet(), tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError):
        load_foreign(Unet(), tmp_path / "missing.safetensors")


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    path = written({**GOOD, **kohya("lora_unet_conv_in", 8, (3, 3, 3), 2, 2.0)}, tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterFileError):
            load_foreign(Unet(), path)


# diffusers' own reader


def unet(diffusers: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(8, 16, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, use_linear_projection=True,
    ).eval()  # fmt: skip


INPUTS = {
    "sample": torch.randn(1, 4, 8, 8),
    "timestep": torch.tensor([3]),
    "encoder_hidden_states": torch.randn(1, 5, 8),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_original_numbering_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    pytest.importorskip("peft")
    t: dict[str, Tensor] = {}
    for block, width in (
        ("input_blocks_4_1", 16),
        ("input_blocks_8_1", 16),
        ("middle_block_1", 16),
        ("output_blocks_2_1", 16),
    ):
        for layer in ("attn1_to_q", "attn1_to_out_0"):
            t.update(kohya(f"lora_unet_{block}_transformer_blocks_0_{layer}", width, (width,), 2, 1.0))
        t.update(kohya(f"lora_unet_{block}_transformer_blocks_0_attn2_to_k", width, (8,), 3, 1.0))
        t.update(kohya(f"lora_unet_{block}_proj_in", width, (width,), 2, 1.0))
    file = written(t, tmp_path)
    mixin = diffusers.loaders.StableDiffusionXLLoraLoaderMixin
    theirs = unet(diffusers)
    state, alphas = mixin.lora_state_dict(str(file), unet_config=theirs.config)
    theirs.load_lora_adapter(state, network_alphas=alphas, prefix="unet")
    ours = load_foreign(unet(diffusers), file)
    assert len(changes(ours)) == len(t) // 3
    with torch.no_grad():
        torch.testing.assert_close(ours(**INPUTS).sample, theirs(**INPUTS).sample, atol=1e-5, rtol=1e-4)
        assert (ours(**INPUTS).sample - unet(diffusers)(**INPUTS).sample).abs().max() > 1e-3


def test_what_is_exported_is_read_by_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")
    pytest.importorskip("peft")
    from graftlet.serve.export import export
    from graftlet.testing.benches import perturb

    config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=["to_q", "to_v", "conv1", "proj_in"],
        rank_pattern={"conv1": 3},
        use_rslora=True,
    )
    ours: Any = graftlet.get_peft_model(unet(diffusers), config)
    perturb(ours)
    export(ours.eval(), tmp_path, "diffusers", component="unet")
    mixin, theirs = diffusers.loaders.StableDiffusionXLLoraLoaderMixin, unet(diffusers)
    state, alphas, told = mixin.lora_state_dict(str(tmp_path), unet_config=theirs.config, return_lora_metadata=True)
    theirs.load_lora_adapter(state, network_alphas=alphas, metadata=told, prefix="unet")
    back = load_foreign(unet(diffusers), tmp_path / "pytorch_lora_weights.safetensors")
    with torch.no_grad():
        y = ours(**INPUTS).sample
        torch.testing.assert_close(theirs(**INPUTS).sample, y, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(back(**INPUTS).sample, y, atol=1e-5, rtol=1e-4)
    assert len(load_file(tmp_path / "pytorch_lora_weights.safetensors")) == 2 * len(changes(ours))
