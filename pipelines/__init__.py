"""The Kubeflow pipeline and the `mint` command."""
