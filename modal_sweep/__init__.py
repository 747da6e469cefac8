"""Durable calls on Modal: jobs are planned and spawned here, run in containers, and collected.

`client/` runs on the launching machine, `container/` in the containers, `protocol/` is what both
ends agree on.
"""
