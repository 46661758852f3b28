"""The OpenAI-compatible HTTP server, its command line and its load test."""
