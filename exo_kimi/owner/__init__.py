"""The owner's day: services that start by themselves, what they do and did, a report to send, and this Mac verified."""
