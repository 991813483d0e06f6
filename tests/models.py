"""Networks for tests, untrained."""

import torch

from vaestream.codec.hyperprior import Hyperprior
from vaestream.codec.mean_branch import MeanContext
from vaestream.codec.scale_branch import ScaleContext


def lively(model: Hyperprior) -> Hyperprior:
    """The model, with contexts that have a say, and a post-filter, as in a trained one;
    they begin without."""
    generator = torch.Generator().manual_seed(3)

    def stir(weight: torch.Tensor, size: float) -> None:
        weight.add_(torch.randn(weight.shape, generator=generator) * size)

    with torch.no_grad():
        for context in (*model.h_s_mean.context.values(), *model.h_s_scale.context.values()):
            assert isinstance(context, MeanContext | ScaleContext)
            stir(context.out.weight, 0.05)
            if isinstance(context, MeanContext) and context.steered:
                stir(context.gate.weight, 0.2)
                stir(context.offset.weight, 0.1)
        if model.post_filter is not None:
            stir(model.post_filter.last.weight, 0.05)
    return model
