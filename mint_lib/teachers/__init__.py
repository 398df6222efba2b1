"""Models that rank the label set for a case: one file a teacher."""
