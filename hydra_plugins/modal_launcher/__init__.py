"""hydra/launcher=modal: every job of a Hydra multirun is a durable call on Modal.

Modules whose name starts with an underscore are not imported when a Hydra app starts.
"""
