"""The target in processes of its own, on other GPUs than the trainers': workers in Ray."""

FLEET = "SPECFORGE_EXP_FLEET"
"""Environment variable: what a trainer joins."""
