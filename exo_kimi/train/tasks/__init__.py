"""What the small model is taught: seeded generators of questions and their only right answers; they know nothing of chats."""
