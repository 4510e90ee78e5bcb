"""HTTP below the routes: bodies, middleware, keys, server-sent events."""
