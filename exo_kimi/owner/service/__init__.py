"""`exo-kimi service`: serve, stage or exo at every login, started again when they end, with logs that do not grow for ever."""
