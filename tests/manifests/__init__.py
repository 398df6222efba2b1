"""Checks on everything that is rendered, as pure functions from Kubernetes objects to findings.

Goes in: objects as dictionaries, of the chart, of our own code, or of the compiled pipeline. Comes out: a list of
`Finding`, empty where all is well. No cluster is asked and nothing is rendered here. One file a subject:

    objects.py       what a finding is, and how an object is named
    pods.py          every pod that objects lead to, also those that KServe and KubeRay will make
    schemas.py       the core's own schemas, true CRD schemas, and the CRDs' CEL rules
    pod_security.py  the Pod Security Standards, baseline and restricted, field by field
    pod_rules.py     what we ask beyond them
    quantities.py    Kubernetes' numbers with units
    access.py        who may do what, against the list in allowed_rbac.yaml
    network.py       what NetworkPolicies let through, by their documented meaning
    flows.py         who may speak to whom here, and the proof over all pairs
    joins.py         names, selectors and references that must meet
    safeguards.py    Pod Security labels, Ray jobs, services open to the outside, quotas
    leaks.py         secrets by value
    steps.py         the steps of a compiled pipeline
    everything.py    all of them in one call
    sample.py        a small installation without a fault, which the mutation tests break
"""
