"""HeRA in LLaMA-Factory's web UI (LlamaBoard)."""
