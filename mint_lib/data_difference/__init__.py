"""What differs between two versions of data: what is held of their rows, their figures, and the comparison."""
