"""Who the clients are: their examples, who is online when, what hostile ones do."""
