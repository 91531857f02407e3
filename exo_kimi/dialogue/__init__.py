"""A conversation to tokens and tokens to the events of a reply: one request, one `prepare`, one decoder for every door."""
