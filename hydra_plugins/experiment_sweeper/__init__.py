"""Sweepers: which jobs run. hydra/sweeper=experiment for grids, =optuna_async for studies."""
