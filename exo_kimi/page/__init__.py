"""The page that `exo-kimi serve` and `exo-kimi ui` show: its files, and what it asks of a server."""
