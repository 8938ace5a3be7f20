"""Replays recorded requests through the core that runs in production, to compare policies."""
