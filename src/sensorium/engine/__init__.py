"""The loop, the way to talk to it, and the frontend that turns prompts into requests and tokens into text."""
