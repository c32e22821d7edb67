"""The synchronous, deterministic heart: pages of tensors, plans over them, sessions. No waiting, no anyio."""
