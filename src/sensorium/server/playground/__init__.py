"""The page at ``GET /``: a chat, the state of the server, and facts of the model for them."""
