"""Ways to align a student on preference pairs: one file a method."""
