"""Tests of laco_train.evaluation."""
