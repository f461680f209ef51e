"""Fixtures of the study's tests: those of whole runs."""

from tests.cli.runs import project, run, shared_project

__all__ = ["project", "run", "shared_project"]
