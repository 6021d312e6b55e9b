"""Stand-in data: drawn faces whose expressions are known."""
