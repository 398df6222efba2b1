"""What the store is made of: the S3 edge, the layout of keys, manifests, writers, aliases and orphans."""
