"""Which worker gets a request: policies over what is known about the workers. Decisions only."""
