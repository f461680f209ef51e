"""Losses that a change which should change no numbers must not change."""
