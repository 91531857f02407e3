"""What the small model is taught: seeded generators of questions with their right answers."""
