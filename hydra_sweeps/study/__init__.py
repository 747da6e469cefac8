"""Studies: Optuna chooses the next job as soon as one ends."""
