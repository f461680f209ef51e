"""Fixtures of whole runs, and of a hub to upload to."""

from tests.cli.runs import project, run, shared_project
from tests.export.test_hub import hub

__all__ = ["hub", "project", "run", "shared_project"]
