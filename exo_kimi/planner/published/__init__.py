"""Published measurements of Macs as data, and what the planner's laws say of each."""
