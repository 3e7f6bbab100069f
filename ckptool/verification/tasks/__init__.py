"""What answers mean: one module for each task, all of the same form."""
