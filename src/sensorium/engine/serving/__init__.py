"""The process of the engine and its front in the server."""
