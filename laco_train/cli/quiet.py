"""Silences messages of Lightning that say nothing to a user of a recipe; each is named."""

import logging
import warnings

_WARNINGS = (
    ".*args parameter is intended to run from within Python.*",  # this is how the program runs it
    ".*does not have many workers.*",  # packed blocks come from memory-mapped files
    ".*LeafSpec.*is deprecated.*",  # Lightning 2.6 with torch 2.13
    ".*is not supported by the model summary.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # what is logged then is the metric over all ranks
)
_TIPS = ("Tip:", "TPU available", "LOCAL_RANK:", "Detected KeyboardInterrupt")


def _no_tip(record: logging.LogRecord) -> bool:
    return not any(tip in record.getMessage() for tip in _TIPS)


def quieten() -> None:
    """Install the filters, for the life of the process."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.pytorch"):
        for target in (logging.getLogger(name), *logging.getLogger(name).handlers):
            target.addFilter(_no_tip)
