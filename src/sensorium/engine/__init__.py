"""The engine: its loop, its process, and the frontend from prompts to text."""
