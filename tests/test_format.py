"""The weights file means what docs/format.md says: read here from its tensors alone."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from test_codec import GOLDEN
from torch import Tensor

from vaestream.codec import Codec
from vaestream.codec.config import ModelConfig
from vaestream.codec.weights_file import export_weights, import_weights


@pytest.mark.parametrize("name", ["steps", "steered", "lattice", "filter"])
def test_means_follow_from_the_tensors_of_the_file(name: str) -> None:
    """Step 2 of "From symbols to pixels"."""
    file = GOLDEN / name / "tiny.safetensors"
    with safe_open(file, "pt") as tensors:
        held = {key: tensors.get_tensor(key).float() for key in tensors.keys()}  # noqa: SIM118
        config = ModelConfig(**json.loads(tensors.metadata()["config"]))

    def layer(path: str, x: Tensor) -> Tensor:
        weight = held[f"h_s_mean.{path}.weight"]
        bias = held.get(f"h_s_mean.{path}.bias")
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)

    def d2s(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = x.view(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(n, c // 4, 2 * h, 2 * w)

    generator = torch.Generator().manual_seed(4)
    z_hat = torch.randint(-3, 4, (1, config.hyper, 2, 3), generator=generator)
    symbols = torch.randint(-4, 5, (1, config.latent, 8, 12), generator=generator).float()
    quality = 40.0  # a node of the quality tables
    condition = held["h_s_mean.condition.nodes"][4][None, :, None, None]
    features = F.relu(d2s(layer("up2", F.relu(d2s(layer("up1", z_hat.float())) + condition))))
    plain = layer("project", features)
    means, residual = plain.clone(), torch.zeros_like(plain)
    for number, p in enumerate(config.passes):
        mean = plain[:, p.start : p.stop].clone()
        if p.known:
            r, path = residual[:, : p.known], f"context.{number}"
            mixed, offset = layer(f"{path}.mix", r), torch.zeros(())
            if config.mean_context_hidden:
                tame = torch.sign(r) * torch.log(1 + r.abs())
                seen = layer(f"{path}.look", tame) + layer(f"{path}.join", features)
                hidden = F.relu(layer(f"{path}.think", F.relu(seen)))
                mixed = mixed * (1 + layer(f"{path}.gate", hidden))
                offset = layer(f"{path}.offset", hidden)
            mean += layer(f"{path}.out", mixed) + offset
        mask = p.mask(8, 12, mean.device)
        chosen = torch.ones(8, 12, dtype=torch.bool) if mask is None else mask
        own = slice(p.start, p.stop)
        means[:, own] = torch.where(chosen, mean, means[:, own])
        decoded = symbols[:, own] + mean - plain[:, own]
        residual[:, own] = torch.where(chosen, decoded, residual[:, own])

    networks = Codec.load(file, device="cpu", precision="float32").networks
    side = networks.side_information(z_hat, networks.quality(quality))
    prior = side.means([(0, 0, 8, 12)])
    upright = symbols.permute(0, 2, 3, 1)
    with torch.no_grad():
        for number, p in enumerate(config.passes):
            prior.reveal(p, upright[..., p.start : p.stop], prior.predict(number, p))
        found = prior.y_hat(config.latent).permute(0, 3, 1, 2)
    assert torch.allclose(found, symbols + means, atol=1e-3)
    assert (means - plain).abs().max() > 0.5  # the contexts have a say


def test_the_post_filter_follows_from_the_tensors_of_the_file() -> None:
    """Step 5 of "From symbols to pixels"."""
    file = GOLDEN / "filter" / "tiny.safetensors"
    with safe_open(file, "pt") as tensors:
        held = {key: tensors.get_tensor(key).float() for key in tensors.keys()}  # noqa: SIM118

    def layer(path: str, x: Tensor) -> Tensor:
        weight, bias = (held[f"post_filter.{path}.{kind}"] for kind in ("weight", "bias"))
        return F.conv2d(x, weight, bias, padding=1)

    def s2d(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(n, 4 * c, h // 2, w // 2)

    generator = torch.Generator().manual_seed(5)
    picture = torch.randn((1, 3, 32, 48), generator=generator) * 20
    unit = 8.84 * (1.576 / 8.84) ** 0.4
    smooth = F.avg_pool2d(picture, 2)
    existing = F.avg_pool2d(torch.ones_like(smooth), 3, 1, 1)
    around = F.avg_pool2d(smooth, 3, 1, 1) / existing
    condition = held["post_filter.condition.nodes"][4][None, :, None, None]
    detail = (s2d(picture) - around.repeat(1, 4, 1, 1)) / unit
    hidden = F.relu(layer("first", detail) + condition)
    hidden = hidden + layer("blocks.0.two", F.relu(layer("blocks.0.one", hidden)))
    expected = s2d(picture) + unit * layer("last", hidden)

    post_filter = import_weights(file.read_bytes()).model.post_filter
    assert post_filter is not None
    with torch.no_grad():
        found = s2d(post_filter(picture, torch.tensor([40.0])).contiguous())
    assert torch.allclose(found, expected, atol=1e-3)
    assert (expected - s2d(picture)).abs().max() > 1  # it has a say


def test_weights_survive_the_file() -> None:
    data = (GOLDEN / "filter" / "tiny.safetensors").read_bytes()
    once = import_weights(data).model
    again = import_weights(export_weights(once)).model
    for (name, one), other in zip(
        once.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6), name
