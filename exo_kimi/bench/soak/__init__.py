"""A server under traffic and troubles for as long as one likes, and what is judged of it."""
