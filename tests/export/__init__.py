"""Tests of laco_train/export."""
