"""Updates of the engine turned into outputs."""
