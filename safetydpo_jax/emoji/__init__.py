"""The embedded world: emoji scenes with their prompts, and a detector that names what is drawn."""
