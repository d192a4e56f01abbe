"""HTTP/1.1 to one server, for the openai backend and the load client."""
