"""The shape of a collapsed model without what the original knew."""

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw all weights of `model` anew, in place, as Transformers initialises a model of its config.

    Types and ties stay, and so does the state of torch's random numbers.

    Args:
        model: on the CPU.
        seed: of the draw, which is in float32 and then rounded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = type(model)(model.config)
    model.load_state_dict(drawn.state_dict())
