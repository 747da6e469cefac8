"""What runs on the launching machine."""
