"""The page about a sweep: what its runs left, how they compare, and what to show of it."""
