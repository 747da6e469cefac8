"""What both ends agree on."""
