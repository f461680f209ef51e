"""Refinement (issue 8): the collapsed model is fitted to the original before it is trained on text."""

from laco_train.refine.batches import leading_batches
from laco_train.refine.kernels import refining
from laco_train.refine.place import Place
from laco_train.refine.refinement import refine
from laco_train.refine.windows import Window, windows_of

__all__ = ["Place", "Window", "leading_batches", "refine", "refining", "windows_of"]
