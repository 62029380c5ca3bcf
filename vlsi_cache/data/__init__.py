"""From chat rows to tensors: records, tokens (prompt and response apart), batches. Imports nothing heavy itself."""
