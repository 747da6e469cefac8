"""Launchers for the tests of sweepers."""
