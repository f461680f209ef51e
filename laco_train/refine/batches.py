"""The blocks that a refinement reads."""

from laco_train.errors import InputError
from laco_train.settings import RefineSettings
from laco_train.training.data import PackedText
from laco_train.training.loss import Batch


def leading_batches(data: PackedText, settings: RefineSettings) -> list[Batch]:
    """Those that training begins with, in whole batches of `settings.batch_size`, for as many tokens or all there are.

    Args:
        data: set up.

    Raises:
        InputError: the text has fewer blocks than one batch.
    """
    size, blocks = settings.batch_size, len(data.train_blocks)
    if blocks < size:
        raise InputError(
            "collapse.refine.batch_size",
            f"is {size}, but data.train makes only {blocks} blocks of {data.settings.block_size} tokens; lower it",
        )
    return data.leading(settings.tokens // data.settings.block_size, size)
