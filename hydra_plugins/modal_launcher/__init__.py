"""hydra/launcher=modal: every job of a Hydra multirun is a durable call on Modal."""
