"""Kubeflow component that ends what a run may have left on the cluster, whatever became of the run."""

from components.component import component


@component
def clean_up(namespace: str) -> None:
    """End the Ray jobs of this run. It never fails the run: each job has its own deadline as well."""
    import logging
    import os

    from components.cluster import delete_ray_jobs
    from components.component import start_logging

    start_logging()
    try:
        delete_ray_jobs(namespace=namespace, run_id=os.environ["MINT_RUN_ID"])
    except Exception as error:
        logging.getLogger("components.clean_up").warning(
            "The run's Ray jobs could not be looked for (%s). They end at their own deadlines.", type(error).__name__
        )
