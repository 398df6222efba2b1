"""Asking a chat model behind an OpenAI-compatible endpoint: the client, and chains of questions about a case."""
