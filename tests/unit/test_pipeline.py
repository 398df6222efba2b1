import ast
import copy
import importlib
import json
import math
import pathlib
import re
import types
from typing import NamedTuple

import pytest
import yaml
from kfp import compiler, dsl
from kubeflow_api import Refusal, check_pipeline

from components.component import show_output
from mint_lib.cluster import ClusterConfig
from mint_lib.errors import InvalidInput
from mint_lib.flow import list_steps
from mint_lib.placement import StepOnCluster, StepsOnCluster
from mint_lib.pods import describe_environment
from mint_lib.ray_job import render_ray_job
from mint_lib.recipe import load_recipe
from mint_lib.records import Reference
from mint_lib.stages import STAGES
from pipelines.mint import build_pipeline
from pipelines.on_cluster import FOLLOWER, MAY_BE_TRIED_AGAIN
from pipelines.planning import describe_placement
from pipelines.submit import compile_recipe

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = sorted((ROOT / "pipelines" / "recipes").glob("*.yaml"))
QUICKSTART = ROOT / "pipelines/recipes/quickstart.yaml"
DIGEST = "@sha256:" + "ab" * 32
CLUSTER = ClusterConfig.model_validate(
    {
        "namespace": "mint",
        "images": {"serve": "registry.example/mint-serve" + DIGEST, "train": "registry.example/mint-train" + DIGEST},
        "s3": {"endpoint_url": "https://s3.example", "bucket": "mint", "prefix": "team"},
        "s3_ca_config_map": "mint-s3-ca",
        "hub_secret": "mint-hub",
        "deidentification_secret": "mint-deidentification",
        "chat_secret": "mint-chat",
        "image_pull_secrets": ["pull-a", "pull-b"],
        "kubeflow": {"host": "https://kubeflow.example"},
        "ray": {"queue": "gpus"},
    }
)
BARE_CLUSTER = CLUSTER.model_copy(
    update={
        **{"s3_secret": None, "s3_ca_config_map": None, "hub_secret": None, "image_pull_secrets": (), "user_id": None},
        **{"deidentification_secret": None, "chat_secret": None},
    }
)
ORDINARY_SECRETS = {"AWS_ACCESS_KEY_ID": "mint-s3", "AWS_SECRET_ACCESS_KEY": "mint-s3", "HF_TOKEN": "mint-hub"}
"""Environment variable to secret, of every pod."""
GPU_STEP = {
    "num_cpus": 16,
    "memory_gib": 64,
    "scratch_gib": 50,
    "num_gpus": 1,
    "gpu_resource": "amd.com/gpu",
    "node_selector": {"pool": "gpu", "zone": "a"},
    "tolerations": [{"key": "amd.com/gpu"}, {"key": "team", "operator": "Equal", "value": "x", "effect": "NoExecute"}],
    "max_retries": 0,
    "timeout_hours": 30,
}
PLACEMENTS = {
    "as the recipe says": None,
    "with GPUs": {"teacher": GPU_STEP, "alignment": GPU_STEP},
    "as Ray jobs": {
        "teacher": GPU_STEP | {"ray": {}},
        "alignment": {"num_cpus": 8, "memory_gib": 16, "timeout_hours": 30, "max_retries": 1, "ray": {}},
    },
}


class Task(NamedTuple):
    """A task of the compiled pipeline with all that is said of it in three places."""

    step: str
    spec: dict
    container: dict
    kubernetes: dict

    @property
    def stage(self):
        return self.kubernetes["podMetadata"]["labels"]["mint.platform/stage"]


def compile_documents(recipe, path, cluster=None):
    if cluster is None:
        compiler.Compiler().compile(build_pipeline(recipe), str(path))
    else:
        compile_recipe(recipe, cluster, path)
    return list(yaml.safe_load_all(path.read_text()))


def read_tasks(pipeline, platform):
    executors = pipeline["deploymentSpec"]["executors"]
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    graphs = [pipeline["root"], *pipeline["components"].values()]
    found = {}
    for graph in graphs:
        for task in graph.get("dag", {}).get("tasks", {}).values():
            label = pipeline["components"][task["componentRef"]["name"]].get("executorLabel")
            if label is not None:
                name = task["taskInfo"]["name"]
                found[name] = Task(name, task, executors[label]["container"], settings[label])
    return found


def name_secrets_of(task):
    """Environment variable to secret, of a task whose variables are named as the secrets' keys."""
    pairs = [(item["secretName"], key) for item in task.kubernetes["secretAsEnv"] for key in item["keyToEnv"]]
    assert all(key["secretKey"] == key["envVar"] for _, key in pairs)
    assert len({key["envVar"] for _, key in pairs}) == len(pairs)
    return {key["envVar"]: secret for secret, key in pairs}


@pytest.fixture(scope="module", params=[(path, name) for path in RECIPES for name in PLACEMENTS], ids=str)
def compiled(request, tmp_path_factory):
    """Every recipe with every placement that fits it: the recipe and its tasks."""
    path, name = request.param
    recipe = load_recipe(path)
    if PLACEMENTS[name] is not None:
        steps = StepsOnCluster.model_validate(PLACEMENTS[name])
        uses_gpu = {"use_gpu": name == "with GPUs", "num_workers": 1, "cpus_per_worker": 2, "deepspeed": None}
        alignment = recipe.alignment.model_copy(update=uses_gpu)
        recipe = recipe.model_copy(update={"cluster": steps, "alignment": alignment})
    documents = compile_documents(recipe, tmp_path_factory.mktemp("compiled") / "pipeline.yaml", CLUSTER)
    return recipe, documents, read_tasks(*documents)


def placement_of(recipe, task):
    """What the task's pod shall get: the recipe's amounts, or little where it follows a Ray job."""
    if task.step == "clean-up":
        return FOLLOWER.model_copy(update={"timeout_hours": 1.0})
    placement = getattr(recipe.cluster, task.stage)
    if placement.ray is None:
        return placement
    times = {"timeout_hours": placement.timeout_hours, "max_retries": placement.max_retries}
    return FOLLOWER.model_copy(update=times)


def test_compiled_pipeline_has_a_task_a_step_and_parses_as_kubeflow_does(compiled):
    recipe, documents, tasks = compiled
    check_pipeline(*documents)
    assert set(tasks) - {"clean-up"} == {step.id for step in list_steps(recipe)}


def test_compiled_check_of_types_can_fail(compiled):
    _, (pipeline, platform), _ = compiled
    broken = copy.deepcopy(platform)
    next(iter(broken["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()))["podMetadata"] = "x"
    with pytest.raises(Refusal):
        check_pipeline(pipeline, broken)


def test_every_task_runs_our_image_by_its_digest(compiled):
    _, (pipeline, _), tasks = compiled
    assert {task.container["image"] for task in tasks.values()} == {CLUSTER.images.train}
    assert {item["container"]["image"] for item in pipeline["deploymentSpec"]["executors"].values()} == {
        CLUSTER.images.train
    }


def test_every_task_gets_what_its_placement_says(compiled):
    recipe, _, tasks = compiled
    for task in tasks.values():
        placement, resources = placement_of(recipe, task), task.container["resources"]
        assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"] == str(placement.num_cpus)
        assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"] == f"{placement.memory_gib}Gi"
        accelerator = {key: value for key, value in resources.get("accelerator", {}).items() if "resource" in key}
        wanted = {"resourceType": placement.gpu_resource, "resourceCount": str(placement.num_gpus)}
        assert accelerator == (wanted if placement.num_gpus else {})
        assert task.kubernetes.get("nodeSelector", {}).get("labels", {}) == placement.node_selector
        assert task.kubernetes.get("tolerations", []) == [
            item.model_dump(exclude_none=True) for item in placement.tolerations
        ]
        assert task.kubernetes["activeDeadlineSeconds"] == str(round(placement.timeout_hours * 3600))
        assert {(item["mountPath"], item["sizeLimit"]) for item in task.kubernetes["emptyDirMounts"]} == {
            ("/tmp", f"{placement.scratch_gib}Gi"),
            ("/var/cache/mint", f"{placement.scratch_gib}Gi"),
        }


def test_every_task_knows_the_store_and_gets_secrets_by_name_only(compiled):
    recipe, _, tasks = compiled
    for task in tasks.values():
        environment = {item["name"]: item["value"] for item in task.container["env"]}
        threads = {"OMP_NUM_THREADS": str(placement_of(recipe, task).num_cpus)}
        assert environment == describe_environment(CLUSTER) | threads
        assert name_secrets_of(task) == ORDINARY_SECRETS
        [config_map] = task.kubernetes["configMapAsVolume"]
        assert (config_map["configMapName"], config_map["mountPath"]) == ("mint-s3-ca", "/etc/mint/ca")


def test_every_task_knows_its_pod_and_run_without_a_parameter(compiled):
    _, _, tasks = compiled
    for task in tasks.values():
        fields = {item["name"]: item["fieldPath"] for item in task.kubernetes["fieldPathAsEnv"]}
        assert fields == {
            "MINT_POD_NAME": "metadata.name",
            "MINT_POD_UID": "metadata.uid",
            "MINT_POD_NAMESPACE": "metadata.namespace",
            "MINT_RUN_ID": "metadata.labels['pipeline/runid']",
        }
        assert "workflow" not in json.dumps(task.spec["inputs"])


def test_every_task_is_a_labelled_pod_without_root(compiled):
    _, _, tasks = compiled
    for task in tasks.values():
        assert task.kubernetes["securityContext"] == {
            "runAsUser": "10001",
            "runAsGroup": "10001",
            "runAsNonRoot": True,
        }
        labels = task.kubernetes["podMetadata"]["labels"]
        assert labels["app.kubernetes.io/part-of"] == "mint"
        assert labels["app.kubernetes.io/component"] == "step"
        assert labels["mint.platform/stage"] == ("alignment" if task.step == "clean-up" else task.step.split("-")[0])
        assert task.kubernetes["imagePullPolicy"] == "IfNotPresent"
        assert [item["secretName"] for item in task.kubernetes["imagePullSecret"]] == ["pull-a", "pull-b"]


def test_retries_are_for_stages_that_may_be_tried_again_and_outlast_a_long_step(compiled):
    recipe, _, tasks = compiled
    assert set(STAGES) - set(MAY_BE_TRIED_AGAIN) == {"registry"}
    for task in tasks.values():
        placement = placement_of(recipe, task)
        if task.stage == "registry" or not placement.max_retries:
            assert "retryPolicy" not in task.spec
            continue
        policy = task.spec["retryPolicy"]
        assert policy["maxRetryCount"] == placement.max_retries
        # Kubeflow's backend counts it from the first attempt's start and ends what runs longer.
        attempts_seconds = (placement.max_retries + 1) * placement.timeout_hours * 3600
        assert int(policy["backoffMaxDuration"].removesuffix("s")) > attempts_seconds


def test_only_what_kubeflow_cannot_know_is_not_cached(compiled):
    _, _, tasks = compiled
    uncached = {name for name, task in tasks.items() if not task.spec.get("cachingOptions", {}).get("enableCache")}
    assert uncached - {"clean-up"} == {"data"}
    assert ("clean-up" in uncached) == ("clean-up" in tasks)


def test_ray_steps_are_jobs_that_are_ended_whatever_becomes_of_the_run(compiled):
    recipe, (pipeline, _), tasks = compiled
    jobs = {step.id for step in list_steps(recipe) if getattr(recipe.cluster, step.stage).ray is not None}
    assert {name for name, task in tasks.items() if "step" in task.spec["inputs"]["parameters"]} == jobs
    assert ("clean-up" in tasks) == bool(jobs)
    root = pipeline["root"]["dag"]["tasks"]
    if not jobs:
        assert set(root) == {task for task in root if not task.startswith("exit-handler")}
        return
    assert set(root) == {"clean-up", "exit-handler-1"}
    assert root["clean-up"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert root["clean-up"]["dependentTasks"] == ["exit-handler-1"]
    assert root["clean-up"]["inputs"]["parameters"]["namespace"]["runtimeValue"]["constant"] == "mint"


def test_ray_job_gets_all_of_its_step(compiled):
    recipe, _, tasks = compiled
    for step in list_steps(recipe):
        placement = getattr(recipe.cluster, step.stage)
        if placement.ray is None:
            continue
        parameters = tasks[step.id].spec["inputs"]["parameters"]
        constants = {
            key: value["runtimeValue"]["constant"] for key, value in parameters.items() if "runtimeValue" in value
        }
        assert constants["stage"] == step.stage
        assert type(step.config).model_validate_json(constants["config"]) == step.config
        assert StepOnCluster.model_validate_json(constants["step"]) == placement
        default = {"serving": type(CLUSTER.serving)(), "kubeflow": type(CLUSTER.kubeflow)()}
        default |= {"deidentification_secret": None, "chat_secret": None}
        assert ClusterConfig.model_validate_json(constants["cluster"]) == CLUSTER.model_copy(update=default)
        # Words NAME=REFERENCE, the reference filled in by Kubeflow.
        assert [word.split("=")[0] for word in constants["inputs"].split()] == list(step.inputs)
        assert constants["inputs"].count("{{$.inputs.parameters['") == len(step.inputs)


def chat_config(variable):
    """A chat teacher's config as an override; without a variable its endpoint wants no key."""
    endpoint = {"base_url": "https://chat.example/v1", "model": "m", "allow_sending_cases_to": "chat.example"}
    step = {"name": "ranking", "shows": ["text"], "prompt": "{case_text} Rank {label_names}.", "max_tokens": 100}
    return json.dumps({"endpoint": endpoint | {"api_key_variable": variable}, "inputs": "text", "steps": [step]})


def ask_chat_model(variable):
    return ("teacher.model=chat", f"teacher.config={chat_config(variable)}")


def test_key_of_a_step_reaches_its_own_pod_and_no_other(tmp_path):
    other = f"baselines.other={{model: chat, config: {chat_config('OTHER_API_KEY')}}}"
    local = f"baselines.local={{model: chat, config: {chat_config(None)}}}"
    ray = "cluster.alignment.ray={}"
    recipe = load_recipe(
        QUICKSTART, overrides=("data.deidentify={}", *ask_chat_model("CHAT_API_KEY"), other, local, ray)
    )
    tasks = read_tasks(*compile_documents(recipe, tmp_path / "pipeline.yaml", CLUSTER))
    own = {name: dict(name_secrets_of(task).items() - ORDINARY_SECRETS.items()) for name, task in tasks.items()}
    assert {name: secrets for name, secrets in own.items() if secrets} == {
        "data": {"MINT_DEIDENTIFICATION_KEY": "mint-deidentification"},
        "teacher": {"CHAT_API_KEY": "mint-chat"},
        "teacher-other": {"OTHER_API_KEY": "mint-chat"},
    }
    assert {"teacher-local", "teacher-ontology", "alignment-orpo", "evaluation", "registry", "clean-up"} <= set(own)
    step = next(step for step in list_steps(recipe) if step.id == "alignment-orpo")
    pairs = {"preferences": f"pairs/x@v000001#sha256:{'0' * 64}"}
    job = render_ray_job(
        "alignment", step.config, pairs, cluster=CLUSTER, step=recipe.cluster.alignment, name="mint-alignment-0"
    )
    assert not re.search("MINT_DEIDENTIFICATION_KEY|CHAT_API_KEY|mint-chat|mint-deidentification", json.dumps(job))


@pytest.mark.parametrize(
    ("overrides", "secret", "words"),
    [
        (("data.deidentify={}",), "deidentification_secret", "holds MINT_DEIDENTIFICATION_KEY"),
        (ask_chat_model("CHAT_API_KEY"), "chat_secret", "the key CHAT_API_KEY"),
    ],
)
def test_recipe_that_needs_a_secret_the_cluster_file_does_not_name_is_refused(overrides, secret, words, tmp_path):
    cluster = CLUSTER.model_copy(update={secret: None})
    recipe = load_recipe(QUICKSTART, overrides=overrides)
    with pytest.raises(InvalidInput, match=f"{words}.* set {secret} to"):
        compile_recipe(recipe, cluster, tmp_path / "pipeline.yaml")
    compile_recipe(recipe, CLUSTER, tmp_path / "pipeline.yaml")


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MINT_RUN_ID", "MINT_DEIDENTIFICATION_KEY"])
def test_chat_key_in_a_variable_of_something_else_is_refused(variable):
    with pytest.raises(InvalidInput, match=f"{variable}.*which holds something else"):
        build_pipeline(load_recipe(QUICKSTART, overrides=ask_chat_model(variable)), CLUSTER)


def test_chat_teacher_with_a_key_is_refused_as_a_ray_job():
    ray = "cluster.teacher.ray={}"
    with pytest.raises(InvalidInput, match=r"CHAT_API_KEY, which only.* Leave cluster\.teacher\.ray out"):
        build_pipeline(load_recipe(QUICKSTART, overrides=(*ask_chat_model("CHAT_API_KEY"), ray)), CLUSTER)
    build_pipeline(load_recipe(QUICKSTART, overrides=(*ask_chat_model(None), ray)), CLUSTER)


def test_retraining_on_cases_of_the_store_needs_no_key_of_deidentification():
    cluster = CLUSTER.model_copy(update={"deidentification_secret": None})
    overrides = ("data.deidentify={}", f"retrain.cases=cases/x@v000002#sha256:{'0' * 64}")
    build_pipeline(load_recipe(QUICKSTART, overrides=overrides), cluster)


def test_what_the_cluster_does_not_have_is_not_asked_for(tmp_path):
    _, *rest = compile_documents(load_recipe(QUICKSTART), tmp_path / "pipeline.yaml", BARE_CLUSTER)
    for settings in rest[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        assert not {"secretAsEnv", "configMapAsVolume", "imagePullSecret"} & set(settings)
        assert settings["securityContext"] == {"runAsNonRoot": True}


def test_compile_gives_the_same_bytes_again_and_holds_no_secret(tmp_path, monkeypatch):
    canaries = {
        "AWS_SECRET_ACCESS_KEY": "canary-s3-5150",
        "HF_TOKEN": "canary-hub-5150",
        "KFP_TOKEN": "canary-kfp-5150",
    }
    recipe = load_recipe(QUICKSTART)
    compile_recipe(recipe, CLUSTER, tmp_path / "a.yaml")
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    compile_recipe(recipe, CLUSTER, tmp_path / "b.yaml")
    assert (tmp_path / "a.yaml").read_bytes() == (tmp_path / "b.yaml").read_bytes()
    assert "canary" not in (tmp_path / "b.yaml").read_text()


@pytest.mark.parametrize("image", ["registry.example/mint:latest", "registry.example/mint", "mint@sha256:abc"])
def test_cluster_with_a_moving_tag_is_refused(image):
    values = CLUSTER.model_dump(mode="json")
    with pytest.raises(ValueError, match="images"):
        ClusterConfig.model_validate(values | {"images": {"serve": image, "train": image}})


def test_cluster_that_holds_a_placeholder_is_refused(tmp_path):
    cluster = CLUSTER.model_copy(update={"s3": CLUSTER.s3.model_copy(update={"prefix": "{{$.x}}"})})
    with pytest.raises(InvalidInput, match="Kubeflow would replace"):
        compile_recipe(load_recipe(QUICKSTART), cluster, tmp_path / "pipeline.yaml")


def test_compile_to_another_kind_of_file_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"\.yaml"):
        compile_recipe(load_recipe(QUICKSTART), CLUSTER, tmp_path / "pipeline.json")
    with pytest.raises(InvalidInput, match="cannot be written"):
        compile_recipe(load_recipe(QUICKSTART), CLUSTER, tmp_path / "absent" / "pipeline.yaml")


@pytest.mark.parametrize("stage", ["data", "preferences", "evaluation", "registry"])
def test_recipe_with_a_stage_that_cannot_be_a_ray_job_is_refused(stage):
    with pytest.raises(InvalidInput, match=f"{stage} cannot be a Ray job"):
        load_recipe(QUICKSTART, overrides=(f"cluster.{stage}.ray={{}}",))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("alignment.use_gpu=true",), "cluster.alignment.num_gpus"),
        (("alignment.cpus_per_worker=4",), "cluster.alignment.num_cpus to at least 4"),
        (("cluster.alignment.ray={}", "alignment.use_gpu=true"), "num_gpus"),
        (("cluster.alignment.ray={workers_per_pod: 2}",), "workers_per_pod"),
    ],
)
def test_step_that_would_wait_for_ever_is_refused_before_anything_is_sent(overrides, words, tmp_path):
    recipe = load_recipe(QUICKSTART, overrides=overrides)
    with pytest.raises(InvalidInput, match=words):
        build_pipeline(recipe, CLUSTER)


def test_local_pipeline_does_not_look_at_the_cluster_section(tmp_path):
    plain = compile_documents(load_recipe(QUICKSTART), tmp_path / "a.yaml")
    overrides = ("cluster.alignment.ray={}", "cluster.data.num_gpus=8", "cluster.teacher.timeout_hours=1")
    assert compile_documents(load_recipe(QUICKSTART, overrides=overrides), tmp_path / "b.yaml") == plain
    assert len(plain) == 1


def test_placement_in_words_counts_the_pods_of_a_ray_job():
    recipe = load_recipe(ROOT / "pipelines/recipes/rare_disease.yaml")
    steps = {step.id: step for step in list_steps(recipe)}
    assert describe_placement(recipe, steps["teacher"]) == "its pod, 8 cores, 48 GiB of memory, 1 x nvidia.com/gpu"
    words = "a Ray job, 1 x (36 cores, 160 GiB of memory, 4 x nvidia.com/gpu), ended after 24 h"
    assert describe_placement(recipe, steps["alignment-orpo"]) == words


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_compiles_to_one_task_a_step(path, tmp_path):
    recipe = load_recipe(path)
    tasks = compile_documents(recipe, tmp_path / "pipeline.yaml")[0]["root"]["dag"]["tasks"]
    assert sorted(task["taskInfo"]["name"] for task in tasks.values()) == sorted(s.id for s in list_steps(recipe))


def test_config_crosses_kubeflow_unchanged(tmp_path):
    recipe = load_recipe(QUICKSTART, overrides=("seed=4294967295",))
    tasks = compile_documents(recipe, tmp_path / "pipeline.yaml")[0]["root"]["dag"]["tasks"]
    for step in list_steps(recipe):
        task = next(task for task in tasks.values() if task["taskInfo"]["name"] == step.id)
        text = task["inputs"]["parameters"]["config"]["runtimeValue"]["constant"]
        assert json.loads(text) == step.config.model_dump(mode="json")
        assert type(step.config).model_validate_json(text) == step.config


def test_components_run_on_our_image_and_install_nothing(tmp_path):
    compiled = compile_documents(load_recipe(RECIPES[0]), tmp_path / "pipeline.yaml")[0]
    for executor in compiled["deploymentSpec"]["executors"].values():
        assert "mint" in executor["container"]["image"]
        assert "pip install" not in " ".join(executor["container"]["command"])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_component_that_takes_its_inputs(stage):
    component = getattr(importlib.import_module(f"components.{stage}"), stage)
    inputs = set(component.component_spec.inputs)
    known = STAGES[stage]
    assert inputs == {"config", *known.inputs, *known.input_maps, *known.optional_inputs}
    assert {"Output", "metrics", "version"} <= set(component.component_spec.outputs)


@pytest.mark.parametrize("name", [*STAGES, "clean_up", "ray_job"])
def test_every_component_is_thin(name):
    source = (ROOT / "components" / f"{name}.py").read_text()
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    assert function.end_lineno - function.lineno <= 25


def test_artifacts_of_an_output_are_what_kubeflow_can_show(tmp_path):
    reference = Reference(kind="student", name="tiny", version="v000003", digest="sha256:" + "cd" * 32)
    values = {"train/loss": 0.5, "top_1": math.nan, "x": math.inf, "by/label/OMIM:1": 1.0}
    store = types.SimpleNamespace(
        settings=CLUSTER.s3,
        record=lambda _: types.SimpleNamespace(counts={"train/num cases": 7}, metrics=values),
    )
    metrics, version = dsl.Metrics(), dsl.Artifact(uri="minio://root/version")
    show_output("alignment", reference, True, store, metrics, version)
    shown = json.loads(json.dumps(metrics.metadata, allow_nan=False))
    assert shown == {"reference": str(reference), "train_loss": 0.5, "train_num_cases": 7.0}
    # Kubeflow's launcher uploads from gs, minio, s3 and oci, and leaves every other scheme alone.
    assert version.uri == f"mint:{reference}"
    assert version.metadata["location"] == "s3://mint/team/student/tiny/v000003/"
    assert version.metadata["digest"] == reference.digest
    assert {type(value) for value in version.metadata.values()} == {str}
