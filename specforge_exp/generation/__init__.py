"""What answers prompts, and how many answers are wanted at a time."""
