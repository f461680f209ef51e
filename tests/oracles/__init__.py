"""Slow versions of what the package does, written from the papers alone: whole copies, full forwards."""
