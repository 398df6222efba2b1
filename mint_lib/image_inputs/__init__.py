"""How image students read: one module for what all of them share, one for each family of architectures."""
