"""From files to batches: records (rows of instruction data), templates (prompts), examples (ids and labels)."""
