"""What is told of a version of cases or preferences: its figures, a readable card and Croissant JSON-LD."""
