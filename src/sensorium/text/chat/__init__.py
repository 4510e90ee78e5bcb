"""Conversations to prompts through chat templates."""
