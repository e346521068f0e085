"""HeRA in the host's web UI (LlamaBoard)."""
