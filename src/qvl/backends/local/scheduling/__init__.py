"""What runs next, and in which memory; without torch."""
