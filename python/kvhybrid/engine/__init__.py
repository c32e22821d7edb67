"""The async skin: requests, sessions, continuous batching. anyio lives here, and nowhere below."""
