"""The inference engine: ranks labels and generates answers for many requests at once. It knows no HTTP and no store."""
