"""Kubeflow Pipelines components: one file a stage."""
