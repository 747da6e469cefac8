"""Train draft models for speculative decoding and measure what they earn."""
