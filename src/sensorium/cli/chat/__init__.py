"""Conversation in the terminal."""
