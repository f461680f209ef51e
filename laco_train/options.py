"""What a recipe's keys are to verbs without a recipe: their options."""

from collections.abc import Iterator
from contextlib import contextmanager

from laco_train.errors import InputError

# by key: the option, what the key's refusals advise, and what helps here
_OPTIONS = {
    "model.source": ("model", "set model.source to", "name"),
    "model.trust_remote_code": ("--trust-remote-code", "set this to true", "add this"),
    "data.column": ("--perplexity", "name a text column", "its column text must hold text"),
}


@contextmanager
def keys_of_options() -> Iterator[None]:
    """Where a key of a recipe is to blame, blame the verb's option in its place.

    Raises:
        InputError: as the block does.
    """
    try:
        yield
    except InputError as error:
        if error.key not in _OPTIONS:
            raise
        option, advice, fix = _OPTIONS[error.key]
        raise InputError(option, str(error).removeprefix(f"{error.key}: ").replace(advice, fix)) from error
