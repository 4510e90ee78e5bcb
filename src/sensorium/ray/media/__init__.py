"""Features of media in the object store of Ray."""
