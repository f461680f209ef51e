"""laco_train: collapse decoder layers of a causal language model, train what is left, export it proven.

`collapse_model` and `CollapsePlan` are imported on first use, so that `--help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laco_train.collapse import CollapsePlan, apply_plan, collapse_model
    from laco_train.settings import CollapseSettings

__version__ = "0.1.0"
__all__ = ["CollapsePlan", "CollapseSettings", "apply_plan", "collapse_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "laco_train.settings" if name == "CollapseSettings" else "laco_train.collapse"
    return getattr(import_module(home), name)
