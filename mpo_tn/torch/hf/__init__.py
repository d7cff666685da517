"""The only part of the adapter that knows transformers."""
