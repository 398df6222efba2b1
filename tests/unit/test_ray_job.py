import base64
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from subprocess import list2cmdline
from typing import Any

import crd_schema
import pytest

from mint_lib.__main__ import main
from mint_lib.cluster import ClusterConfig, Images, RayOnCluster, Toleration
from mint_lib.errors import InvalidInput, MintError
from mint_lib.placement import RayWorkers, StepOnCluster
from mint_lib.ray_job import CONTENT_ANNOTATION, JOB_LABEL, MAX_NAME_LENGTH, name_ray_job, render_ray_job
from mint_lib.stages import STAGES, group_words
from mint_lib.storage.settings import S3Settings
from mint_lib.student import StudentConfig
from mint_lib.teacher import TeacherConfig
from mint_lib.training.settings import AlignmentConfig

IMAGE = "registry.example.org:5000/mint/train@sha256:" + "ef" * 32
STORE = S3Settings(endpoint_url="https://s3.example.org", bucket="models", prefix="team/a")
CLUSTER = ClusterConfig(
    namespace="clinic",
    images=Images(serve="registry.example.org/mint/serve@sha256:" + "cd" * 32, train=IMAGE),
    s3=STORE,
    s3_ca_config_map="mint-s3-ca",
    hub_secret="mint-hub",
    image_pull_secrets=("pull",),
)
PREFERENCES = "preferences/study@v000001#sha256:" + "ab" * 32
CONFIG = AlignmentConfig(
    name="study",
    seed=1,
    student=StudentConfig(model="tiny", window_tokens=512),
    num_workers=4,
    cpus_per_worker=3,
    use_gpu=True,
)
STEP = StepOnCluster(
    num_cpus=8,
    memory_gib=64,
    scratch_gib=50,
    num_gpus=2,
    node_selector={"gpu": "a100"},
    tolerations=(Toleration(key="nvidia.com/gpu"),),
    ray=RayWorkers(workers_per_pod=2, shared_memory_gib=16, deadline_hours=1.5, max_restarts=2),
)
NAME = "mint-alignment-0123456789abcdef"


def render(
    *,
    config: dict[str, Any] | None = None,
    step: dict[str, Any] | None = None,
    workers: dict[str, Any] | None = None,
    ray: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """The job with other values in each of its sources."""
    given = STEP.model_copy(update={"ray": STEP.ray and STEP.ray.model_copy(update=workers or {}), **(step or {})})
    cluster = CLUSTER.model_copy(update={"ray": RayOnCluster(**(ray or {}))})
    arguments: dict[str, Any] = {"inputs": {"preferences": PREFERENCES}, "name": NAME} | changes
    inputs = arguments.pop("inputs")
    return render_ray_job(
        "alignment", CONFIG.model_copy(update=config or {}), inputs, cluster=cluster, step=given, **arguments
    )


def groups_of(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Component to its group; the submitter is a group of one."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    groups.append({"template": job["spec"]["submitterPodTemplate"]})
    return {group["template"]["metadata"]["labels"]["app.kubernetes.io/component"]: group for group in groups}


def pods_of(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {component: group["template"]["spec"] for component, group in groups_of(job).items()}


def environment_of(pod: dict[str, Any]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in pod["containers"][0]["env"]}


def alone() -> dict[str, Any]:
    """One worker, so no worker pods."""
    return render(config={"num_workers": 1}, workers={"workers_per_pod": 1}, step={"num_gpus": 1})


@pytest.mark.parametrize(
    "job",
    [
        render(),
        alone(),
        render(run_id="7c1f"),
        render(ray={"queue": "clinic", "workload_priority": "high", "pod_priority": "batch", "is_encrypted": True}),
    ],
    ids=["workers", "alone", "run", "everything"],
)
def test_ray_job_is_accepted_by_the_crd(job: dict[str, Any]) -> None:
    if not crd_schema.CRD_FOLDER.is_dir():
        pytest.skip("the CRD schemas are not on this machine")
    assert crd_schema.find_schema_errors(job) == []


def test_ray_job_with_a_misspelt_field_is_refused_by_the_crd() -> None:
    if not crd_schema.CRD_FOLDER.is_dir():
        pytest.skip("the CRD schemas are not on this machine")
    job = render()
    job["spec"]["activeDeadlineSecond"] = 1
    assert crd_schema.find_schema_errors(job)


@pytest.mark.parametrize("job", [render(run_id="7c1f"), alone()], ids=["workers", "alone"])
def test_ray_job_pods_are_restricted_with_a_read_only_root_and_no_token(job: dict[str, Any]) -> None:
    for pod in pods_of(job).values():
        assert pod["automountServiceAccountToken"] is False
        assert pod["serviceAccountName"] == "mint-ray"
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert container["image"] == IMAGE
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"]["limits"])
        assert all("emptyDir" in volume or "configMap" in volume for volume in pod["volumes"])


def test_ray_job_with_workers_has_pods_of_workers_and_a_head_that_computes_nothing() -> None:
    groups, pods = groups_of(render()), pods_of(render())
    workers = groups["ray-worker"]
    assert [workers[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 2]
    assert workers["rayStartParams"]["num-gpus"] == "2"
    limits = pods["ray-worker"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "2", "ephemeral-storage": "51Gi"}
    assert pods["ray-worker"]["nodeSelector"] == {"gpu": "a100"}
    assert pods["ray-worker"]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert groups["ray-head"]["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in pods["ray-head"]["containers"][0]["resources"]["limits"]
    assert "nodeSelector" not in pods["ray-head"]


def test_ray_job_with_one_worker_computes_in_its_head() -> None:
    groups, pods = groups_of(alone()), pods_of(alone())
    assert set(groups) == {"ray-head", "ray-submitter"}
    assert "num-cpus" not in groups["ray-head"]["rayStartParams"]
    assert pods["ray-head"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pods["ray-head"]["nodeSelector"] == {"gpu": "a100"}


def test_ray_job_of_a_teacher_computes_in_its_head_with_the_gpus_that_it_asks_for() -> None:
    step = STEP.model_copy(update={"num_gpus": 1, "ray": RayWorkers()})
    config = TeacherConfig.model_validate({"name": "study", "seed": 1, "model": "ontology"})
    job = render_ray_job("teacher", config, {"cases": PREFERENCES}, cluster=CLUSTER, step=step, name="mint-teacher-1")
    assert set(groups_of(job)) == {"ray-head", "ray-submitter"}
    assert pods_of(job)["ray-head"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_ray_job_shared_memory_holds_the_object_store() -> None:
    group, pod = groups_of(render())["ray-worker"], pods_of(render())["ray-worker"]
    (volume,) = (volume for volume in pod["volumes"] if volume.get("emptyDir", {}).get("medium") == "Memory")
    assert volume["emptyDir"]["sizeLimit"] == "16Gi"
    assert {"name": volume["name"], "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    assert int(group["rayStartParams"]["object-store-memory"]) <= 16 * 2**30


def test_ray_job_workers_share_the_threads_of_their_pod() -> None:
    assert environment_of(pods_of(render())["ray-worker"])["OMP_NUM_THREADS"] == "3"


def test_ray_job_secrets_are_named_and_its_submitter_gets_none() -> None:
    pods = pods_of(render())
    for component in ("ray-head", "ray-worker"):
        environment = environment_of(pods[component])
        assert environment["AWS_SECRET_ACCESS_KEY"] == {
            "secretKeyRef": {"name": "mint-s3", "key": "AWS_SECRET_ACCESS_KEY"}
        }
        assert environment["HF_TOKEN"] == {"secretKeyRef": {"name": "mint-hub", "key": "HF_TOKEN"}}
        assert environment["MINT_S3_CA_BUNDLE"] == "/etc/mint/ca/ca.crt"
    assert not {name for name in environment_of(pods["ray-submitter"]) if name.startswith(("AWS_", "HF_", "MINT_"))}


def test_ray_job_writes_only_where_volumes_are() -> None:
    for pod in pods_of(render()).values():
        environment = environment_of(pod)
        mounted = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"] if not mount.get("readOnly")}
        for name in ("HOME", "RAY_TMPDIR", "MINT_CACHE_DIR", "HF_HOME"):
            path = environment.get(name)
            assert path is None or any(path == place or path.startswith(f"{place}/") for place in mounted)


def test_ray_job_asks_for_token_authentication_and_names_its_version() -> None:
    cluster = render()["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 54, 0)


def test_ray_job_is_encrypted_only_where_the_cluster_says_so() -> None:
    assert "tlsOptions" not in render()["spec"]["rayClusterSpec"]
    assert render(ray={"is_encrypted": True})["spec"]["rayClusterSpec"]["tlsOptions"] == {"enabled": True}


def test_ray_job_frees_its_pods_and_has_a_deadline_and_restarts() -> None:
    spec = render()["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] == 0
    assert spec["activeDeadlineSeconds"] == 5400
    assert spec["backoffLimit"] == 2
    assert spec["submissionMode"] == "K8sJobMode"


def test_ray_job_is_queued_by_kueue_only_where_there_is_a_queue() -> None:
    labels = render(ray={"queue": "clinic", "workload_priority": "high"})["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "clinic"
    assert labels["kueue.x-k8s.io/priority-class"] == "high"
    assert "suspend" not in render(ray={"queue": "clinic"})["spec"]  # Kueue's webhook sets it
    assert not [label for label in render()["metadata"]["labels"] if label.startswith("kueue")]


def test_ray_job_pods_get_the_pod_priority() -> None:
    pods = pods_of(render(ray={"pod_priority": "batch"})).values()
    assert {pod["priorityClassName"] for pod in pods} == {"batch"}


def test_ray_job_and_its_pods_carry_labels_of_run_stage_and_job() -> None:
    job = render(run_id="7c1f")
    labelled = [job["metadata"], *(group["template"]["metadata"] for group in groups_of(job).values())]
    for metadata in labelled:
        assert metadata["labels"]["mint.platform/run"] == "7c1f"
        assert metadata["labels"]["mint.platform/stage"] == "alignment"
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "mint"
        assert metadata["labels"][JOB_LABEL] == NAME


def test_ray_job_content_is_the_same_in_another_run_and_not_with_another_config() -> None:
    def content(job: dict[str, Any]) -> str:
        return str(job["metadata"]["annotations"][CONTENT_ANNOTATION])

    assert content(render(run_id="a")) == content(render(run_id="b")) == content(render())
    assert content(render(config={"seed": 2})) != content(render())
    assert content(render(step={"memory_gib": 65})) != content(render())


def test_ray_job_shows_its_config_to_people() -> None:
    shown = json.loads(render()["metadata"]["annotations"]["mint.platform/config"])
    assert AlignmentConfig.model_validate(shown) == CONFIG


def test_ray_job_name_of_a_key_is_one_that_kuberay_accepts() -> None:
    names = {name_ray_job(stage, "0f" * 32) for stage in STAGES}
    assert len(names) == len(STAGES)
    assert all(re.fullmatch(r"[a-z][-a-z0-9]*", name) and len(name) <= MAX_NAME_LENGTH for name in names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": {"ray": None}}, "has no section `ray`"),
        ({"config": {"num_workers": 3}}, "divides 3"),
        ({"config": {"num_workers": 1}}, "divides 1"),
        ({"step": {"num_gpus": 1}}, "set num_gpus to workers_per_pod (2)"),
        ({"step": {"num_gpus": 4}}, "set num_gpus to workers_per_pod (2)"),
        ({"config": {"use_gpu": False}}, "alignment.use_gpu to true"),
        ({"config": {"use_gpu": False, "deepspeed": {}}, "step": {"num_gpus": 0}}, "DeepSpeed is for GPUs"),
        ({"config": {"cpus_per_worker": 5}}, "at least 10"),
        ({"workers": {"shared_memory_gib": 64}}, "Set memory_gib higher"),
        ({"name": "0-begins-with-a-digit"}, "cannot name a Ray job"),
        ({"name": "a" * (MAX_NAME_LENGTH + 1)}, "cannot name a Ray job"),
        ({"inputs": {"preferences": "x; rm -rf ~"}}, "cannot stand in a Ray job's command"),
        ({"inputs": {"preferences": {"two words": PREFERENCES}}}, "cannot stand in a Ray job's command"),
    ],
)
def test_ray_job_that_would_fail_on_the_cluster_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(words)):
        render(**changes)


HARD_TEXT = "quotes ' \" ` and $HOME $(id) \\ \\\\ ; & | > < ! # ~ * ? {a,b} %PATH% \n\ttab é 漢字 😀"


def test_ray_job_entrypoint_survives_every_shell_on_its_way(tmp_path: Path) -> None:
    inputs = {"preferences": PREFERENCES, "students": {"orpo/seed-1": PREFERENCES, "sft": PREFERENCES}}
    job = render(config={"method_config": {"text": HARD_TEXT}}, inputs=inputs)
    # bash of the submitter's pod, the `ray` command's joining of its arguments, and the shell of Ray's job supervisor
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {job['spec']['entrypoint']}"], capture_output=True, check=True
    ).stdout.decode()
    joined = list2cmdline(words.split("\0")[:-1])
    shim = tmp_path / "python"
    shim.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    shim.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    arrived = json.loads(
        subprocess.run(["sh", "-c", joined], capture_output=True, check=True, env=environment).stdout.decode()
    )
    assert arrived == shlex.split(job["spec"]["entrypoint"])[1:]
    assert arrived[:3] == ["-m", "mint_lib", "alignment"]
    config = json.loads(base64.urlsafe_b64decode(arrived[arrived.index("--config-base64") + 1]))
    assert config["method_config"]["text"] == HARD_TEXT
    given = [arrived[index + 1] for index, word in enumerate(arrived) if word == "--input"]
    assert given == [
        f"preferences={PREFERENCES}",
        f"students=orpo/seed-1={PREFERENCES}",
        f"students=sft={PREFERENCES}",
    ]


def test_group_words_gathers_several_references_of_one_input() -> None:
    words = ["cases=a", "students=orpo/seed-1=b", "students=sft=c"]
    grouped = group_words("evaluation", words)
    assert grouped == {"cases": "a", "students": "orpo/seed-1=b sft=c", "baselines": ""}


@pytest.mark.parametrize("words", [["preferences"], ["preferences=a", "preferences=b"]])
def test_group_words_that_make_no_sense_are_refused(words: list[str]) -> None:
    with pytest.raises(InvalidInput):
        group_words("alignment", words)


def test_entry_point_reads_a_config_in_base64(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    seen = {}

    def run_stage(stage: str, config: str, inputs: dict[str, str], *, store: object) -> Any:
        seen.update(stage=stage, config=config, inputs=inputs)
        raise InvalidInput("nothing to do")

    monkeypatch.setattr("mint_lib.stages.run_stage", run_stage)
    monkeypatch.setattr("mint_lib.store.Store.from_environment", lambda: None)
    text = json.dumps({"text": HARD_TEXT}, ensure_ascii=False)
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    assert main(["alignment", "--config-base64", encoded, "--input", f"preferences={PREFERENCES}"]) == 1
    assert seen == {"stage": "alignment", "config": text, "inputs": {"preferences": PREFERENCES}}
    assert capsys.readouterr().err.endswith("InvalidInput: nothing to do\n")


@pytest.mark.parametrize(
    "arguments",
    [["--config-base64", "?"], ["--config-base64", "_w=="], [], ["--config", "{}", "--config-base64", "e30="]],
)
def test_entry_point_with_wrong_arguments_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["alignment", *arguments])
    assert caught.value.code == 2


@pytest.mark.parametrize(("error", "code"), [(MintError("ours"), 1), (RuntimeError("not ours"), 3)])
def test_entry_point_exit_code_says_whose_error_it_was(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def run_stage(*arguments: object, **options: object) -> Any:
        raise error

    monkeypatch.setattr("mint_lib.stages.run_stage", run_stage)
    monkeypatch.setattr("mint_lib.store.Store.from_environment", lambda: None)
    assert main(["data", "--config", "{}"]) == code
