"""Two machines become one cluster by a short code that a person carries from one screen to the other."""
