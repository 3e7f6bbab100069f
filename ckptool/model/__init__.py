"""The words that every room speaks: plain, typed values without torch, rich or typer."""
