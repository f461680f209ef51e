"""Thin callbacks: each decides when, and calls a pure function for what."""
