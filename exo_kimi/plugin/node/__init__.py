"""What acts for a node or beside it: keeps plans placed, and answers exo's own placing with our planner."""
