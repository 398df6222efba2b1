"""What an aligned student is measured on: one file a task."""
