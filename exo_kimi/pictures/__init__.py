"""Pictures of requests: where they come from, their pixels as the vision tower takes them, and what is refused."""
