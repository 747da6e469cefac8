"""Which jobs of a Hydra multirun run: grids and Optuna studies."""
