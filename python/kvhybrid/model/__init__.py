"""Models and how they attend: torch and transformers live here, and nowhere below."""
