"""What every alignment method trains with: prompt trees of pairs, Ray Train, and the watch over a run."""
