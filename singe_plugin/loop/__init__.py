"""The loop: how much goes and when, removals, fine-tuning, and what happens on the way."""
