"""exo's HTTP API: what goes wrong with a Kimi's answer reaches the person, with words and a status, on every route."""
