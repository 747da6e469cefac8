"""Triton kernels of the training step, each an operator of torch.

On CUDA they stand for what plain operators do in many passes over memory.
"""

USED: set[str] = set()
"""Types of devices whose steps are by them: `check.use_kernels` adds one where they are right."""
