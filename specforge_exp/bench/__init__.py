"""What is asked of an exported draft, what answers it, and the figures it earns."""
