"""Tests of laco_train.collapse."""
