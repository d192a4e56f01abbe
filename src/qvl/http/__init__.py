"""An HTTP/1.1 client for one server, used by the openai backend and the load client."""
