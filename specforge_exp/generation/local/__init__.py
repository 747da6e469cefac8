"""Our own engine: transformers with continuous batching and a prefix cache, and a server of it."""
