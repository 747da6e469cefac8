"""Grids: lists of overrides, run once each."""
