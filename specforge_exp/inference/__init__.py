"""The target in processes of its own, on other GPUs than the trainers': workers in Ray."""
