"""Training the last layers and the head alone."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from laco_train.collapse import decoder_of
from laco_train.errors import InputError


def train_last_layers(model: PreTrainedModel, layers: int) -> None:
    """Let the last `layers` decoder layers of `model` (already collapsed), the final norm and the head train.

    Everything else is frozen, and nothing below the first of those layers takes part in the backward pass. A head that
    is tied to the embeddings trains as a head: the embeddings change with it, but get no gradient as embeddings.

    Raises:
        InputError: more layers than `model` has.
    """
    decoder = decoder_of(model)
    if layers > decoder.depth:
        raise InputError("model.last_layers", f"is {layers}, but the model has {decoder.depth} layers left; lower it")
    model.requires_grad_(False)
    for part in (*decoder.stack[decoder.depth - layers :], decoder.norm, model.get_output_embeddings()):
        if part is not None:
            part.requires_grad_(True)
    # of tied embeddings, else their gradient would have to pass through every frozen layer
    model.get_input_embeddings().register_forward_hook(_cut_graph)


def _cut_graph(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.detach()
