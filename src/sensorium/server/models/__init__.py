"""The models of a server: names, states, and the memory that they share."""
