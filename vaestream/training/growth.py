"""Networks that grow: trained weights in a model with more parts."""

import re

import torch
from torch import Tensor

from vaestream.codec.config import CodingPass, ModelConfig
from vaestream.codec.hyperprior import Hyperprior

_CONTEXT = re.compile(r"(h_s_\w+\.context)\.(\d+)\.(\w+)\.(\w+)")
_BY_KNOWN = ("mix", "look")  # layers that have an input for every known channel
_BY_CHANNEL = ("out", "offset")  # layers that have an output for every channel of their pass
_NEW_BLOCK = re.compile(r"g_\w\.blocks\d+\.\d+\.expand\.\w+|post_filter\.blocks\.\d+\.two\.\w+")


def grown(model: Hyperprior, config: ModelConfig) -> Hyperprior:
    """A model of another shape that gives what `model` gives, and learns from there.

    `config` may have a post-filter, more residual blocks, groups and steps that are split further,
    and steered contexts. A pass takes the contexts of the one that codes its symbols in `model`;
    what it knows beyond that has no weight at first, nor do new steering, a new post-filter and new
    blocks add anything. Only a lattice, if `config` has another, changes what is coded at once.

    Raises ValueError if something of `model` has no place in `config`.
    """
    new = Hyperprior(config)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if _NEW_BLOCK.fullmatch(name):
                parameter.zero_()
    theirs, ours = new.state_dict(), model.state_dict()
    for name, tensor in ours.items():
        if _CONTEXT.fullmatch(name):
            continue
        if name not in theirs or theirs[name].shape != tensor.shape:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} does not fit {config}")
        theirs[name] = tensor
    taken = set()
    for name, target in theirs.items():
        if (match := _CONTEXT.fullmatch(name)) is None:
            continue
        branch, number, layer, kind = match.groups()
        p = config.passes[int(number)]
        source = _covering(model.config.passes, p)
        old_name = f"{branch}.{source}.{layer}.{kind}"
        if source is not None and old_name in ours:
            old = model.config.passes[source]
            _inherit(target, ours[old_name], old, p, layer, kind)
            taken.add(old_name)
    for name in ours:
        if _CONTEXT.fullmatch(name) and name not in taken:
            raise ValueError(f"{name} has no place in {config}")
    new.load_state_dict(theirs)
    return new


def _covering(passes: tuple[CodingPass, ...], p: CodingPass) -> int | None:
    """The number of the pass that codes what `p` codes, and knows no more."""
    for number, old in enumerate(passes):
        channels = old.start <= p.start and p.stop <= old.stop and old.known <= p.known
        places = old.cosets is None or (p.cosets is not None and set(p.cosets) <= set(old.cosets))
        if channels and places:
            return number
    return None


def _inherit(
    target: Tensor, tensor: Tensor, old: CodingPass, p: CodingPass, layer: str, kind: str
) -> None:
    """Set a tensor of the contexts of `p` to what that of `old` says."""
    if layer in _BY_CHANNEL:
        tensor = tensor[p.start - old.start : p.stop - old.start]
    if layer in _BY_KNOWN and kind == "weight":
        target.zero_()
        target = target[:, : old.known]
    if target.shape != tensor.shape:
        raise ValueError(f"contexts of {tuple(tensor.shape)} do not fit {tuple(target.shape)}")
    target.copy_(tensor)
