"""The loop that lets a model use the tools, permissions, and the terminal."""
