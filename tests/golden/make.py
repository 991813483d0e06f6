"""Write golden files of the present format into a folder of their own.

    python tests/golden/make.py NAME

Run by hand, and only when the format changes: the files that are there stay as they are.
"""

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from vaestream.codec import Codec
from vaestream.codec.bitstream import unpack
from vaestream.codec.config import ModelConfig
from vaestream.codec.hyperprior import Hyperprior
from vaestream.codec.mean_branch import MeanContext
from vaestream.codec.scale_branch import ScaleContext
from vaestream.codec.weights_file import export_weights

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_codec import GOLDEN, photo_like

torch.manual_seed(1)
folder = GOLDEN / sys.argv[1]
folder.mkdir()
model = Hyperprior(
    ModelConfig(16, 4, 8, 8, 1, 1, 1, 1, 4, 4, (2, 5, 9), 4, 4, (3, 2, 1), 6, 4, 8, 1)
)
with torch.no_grad():  # so that every path contributes, as in a trained model, and more strongly
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    model.h_a.down2.weight.mul_(8)  # hyper-latents that need their tables, and escapes
    assert model.h_s_scale.project.bias is not None
    model.h_s_scale.project.bias.copy_(torch.linspace(7, -1, 16))  # indices low and high
    assert model.post_filter is not None
    for table in (model.g_s.condition, model.h_s_mean.condition, model.post_filter.condition):
        table.nodes.add_(torch.randn_like(table.nodes))
    model.post_filter.last.weight.mul_(4)
    for context in (*model.h_s_mean.context.values(), *model.h_s_scale.context.values()):
        assert isinstance(context, MeanContext | ScaleContext)
        context.out.weight.add_(torch.randn_like(context.out.weight) * 0.2)
        if isinstance(context, MeanContext):
            for layer in (context.gate, context.offset):
                layer.weight.add_(torch.randn_like(layer.weight))
weights = export_weights(model)
(folder / "tiny.safetensors").write_bytes(weights)
codec = Codec(weights, torch.device("cpu"), torch.float32)
smooth = np.tile(np.arange(40, 140, dtype=np.uint8)[:, None], (1, 60))
for name, image, quality, ratio in (
    ("gray", photo_like(45, 70, channels=1), 35.0, 1.0),
    ("colour", photo_like(70, 45), 80.0, 1.0),
    ("tiles", photo_like(20, 530), 100.0, 1.0),
    ("smooth", smooth, 5.0, 1.0),
    ("flat", np.full((100, 80), 90, np.uint8), 0.0, 1.0),
    ("reduced", photo_like(75, 101), 60.0, 1.5),
    ("reduced-gray", photo_like(75, 101, channels=1), 20.0, 3.0),
):
    with patch("vaestream.codec.encoder.best_ratio", return_value=ratio):
        (blob,) = codec.encode([image], quality)
    if name == "flat":  # nothing in narrow tables: they are skipped, a part of a group with them
        assert unpack(blob).tiles[0][0] > model.config.lattice_from
    (folder / f"{name}.vst").write_bytes(blob)
    np.save(folder / f"{name}.npy", codec.decode([blob])[0])
