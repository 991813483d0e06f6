"""Networks that grow: trained weights in a model with more parts."""

import re

from vaestream.codec.config import ModelConfig
from vaestream.codec.hyperprior import Hyperprior


def grown(model: Hyperprior, config: ModelConfig) -> Hyperprior:
    """A model of another shape that begins where `model` stands, as far as both have the same.

    Contexts go with the pass that they serve, whatever its number; new passes know no contexts,
    new steering does nothing and new residual blocks add little at first, and all learn from
    there.

    Raises ValueError if a part that both have differs in its shape.
    """
    new = Hyperprior(config)
    numbers = {p: number for number, p in enumerate(config.passes)}
    moved = {str(old): str(numbers.get(p, "")) for old, p in enumerate(model.config.passes)}
    theirs, ours = new.state_dict(), model.state_dict()
    for name, tensor in ours.items():
        target = re.sub(r"(?<=context\.)\d+", lambda match: moved[match[0]], name)
        if target not in theirs:
            continue
        if theirs[target].shape != tensor.shape:
            raise ValueError(f"{target}: {tuple(tensor.shape)} does not fit {config}")
        theirs[target] = tensor
    new.load_state_dict(theirs)
    return new
