"""The built images at work: every container with a read-only root, without capabilities, under a number nobody knows.

The images come from `.ci/images`, the engine is named by MINT_TEST_DOCKER_HOST (or DOCKER_HOST). Store and students are
the session's real S3 server and the tiny student.
"""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import yaml
from stored_models import TEXT, make_adapter, write_model

import mint_lib
from mint_lib.code_version import code_version
from mint_lib.flow import list_steps
from mint_lib.recipe import load_recipe
from mint_lib.records import Reference
from mint_lib.report_records import EvaluationReport
from mint_lib.server.access import TokensFile, issue_token
from mint_lib.store import Store

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = pathlib.Path(__file__).parent / "recipes" / "tiny.yaml"
TRAIN, SERVE = "mint-train:ci", "mint-serve:ci"
# As the pods of a cluster: nothing can be written but two volumes, and nothing can be gained.
CONFINED = (
    *("--rm", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "2000"),
    *("--tmpfs", "/tmp", "--tmpfs", "/var/cache/mint"),
)
STORE_VARIABLES = (
    *("MINT_S3_ENDPOINT_URL", "MINT_S3_BUCKET", "MINT_S3_PREFIX", "MINT_S3_REGION", "MINT_S3_PATH_STYLE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
)
# With the store on the host's loopback.
WITH_STORE = ("--network", "host", *(word for name in STORE_VARIABLES for word in ("-e", name)))
PIPELINE = """
import os, pathlib, sys
from kfp import local
from mint_lib.recipe import load_recipe
from pipelines.mint import build_pipeline

user, folder, recipe, *overrides = sys.argv[1:]
names = os.environ["MINT_STORE_VARIABLES"].split()
local.init(
    runner=local.DockerRunner(
        user=user, environment={name: os.environ[name] for name in names}, network_mode="host", read_only=True,
        tmpfs={"/tmp": "", "/var/cache/mint": ""}, cap_drop=["ALL"], security_opt=["no-new-privileges"],
        mem_limit="4g", shm_size="512m", pids_limit=4000,
    ),
    pipeline_root=folder,
)
build_pipeline(load_recipe(pathlib.Path(recipe), overrides=tuple(overrides)))()
"""


@pytest.fixture(scope="session", autouse=True)
def engine() -> Iterator[None]:
    """The engine that holds both images, named in the environment for the clients that the tests start."""
    host = os.environ.get("MINT_TEST_DOCKER_HOST") or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", host)
        if shutil.which("docker") is None:
            pytest.skip("no docker client; .ci/images installs one and builds the images")
        for image in (TRAIN, SERVE):
            if docker("image", "inspect", image).returncode != 0:
                pytest.skip(f"{host} holds no {image}; .ci/images builds it and prints the engine's address")
        yield


@pytest.fixture(scope="module")
def flow_store(s3_store: Callable[[], Store]) -> Iterator[Store]:
    """One store for all runs of the tiny recipe, so that they share what is equal."""
    store = s3_store()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINT_S3_PREFIX", store.settings.prefix)
        yield store


def docker(*arguments: str, seconds: int = 300) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=seconds)


def any_user() -> str:
    """A user that no image knows, as OpenShift picks one."""
    return f"{20000 + secrets.randbelow(10**6)}:0"


def run(image: str, *command: str, user: str | None = None, options: tuple[str, ...] = ()) -> str:
    """What a confined container prints; it must end well."""
    done = docker("run", *CONFINED, "--memory", "2g", "--user", user or any_user(), *options, image, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def find_files(image: str, *tests: str) -> list[str]:
    """Files of the whole image, looked for as root."""
    done = docker("run", "--rm", "--network", "none", "--user", "0", image, "find", "/", "-xdev", "-type", "f", *tests)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def read_bill(image: str) -> dict[str, str]:
    """The packages that the image's bill of materials names, with their versions."""
    bill = json.loads(run(image, "cat", "/usr/share/mint/sbom.cdx.json"))
    assert bill["bomFormat"] == "CycloneDX"
    for component in bill["components"]:
        assert component["type"] == "library"
        assert component.get("purl", "").startswith("pkg:pypi/") or component["name"] == "mint-platform"
    return {component["name"].lower().replace("_", "-"): component["version"] for component in bill["components"]}


@pytest.mark.parametrize("user", ["10001:10001", "54321:54321", "54321:0"])
@pytest.mark.parametrize("image", [TRAIN, SERVE])
def test_image_runs_its_commands_for_any_user_and_writes_to_its_volumes_only(image: str, user: str) -> None:
    script = """
        id -u && mint --help && python3 -m mint_lib --help && python3 -c 'import torch, transformers, peft'
        for place in "$HOME" "$MPLCONFIGDIR" "$RAY_TMPDIR" "$TRITON_CACHE_DIR" "$TORCHINDUCTOR_CACHE_DIR" \
            "$TORCH_EXTENSIONS_DIR" "$MINT_CACHE_DIR" "$HF_HOME"; do
          mkdir -p "$place" && touch "$place/written"
        done
        if touch /opt/mint/written /written 2>/dev/null; then exit 9; fi
    """
    printed = run(image, "sh", "-euc", script, user=user)
    assert printed.splitlines()[0] == user.partition(":")[0]
    assert "promote" in printed
    assert "{alignment,data,evaluation," in printed


@pytest.mark.parametrize("image", [TRAIN, SERVE])
def test_image_names_an_unprivileged_user_and_what_it_is_made_of(image: str) -> None:
    [found] = json.loads(docker("image", "inspect", image).stdout)
    labels = found["Config"]["Labels"]
    assert found["Config"]["User"] == "10001:10001"
    assert labels["org.opencontainers.image.title"] == image.partition(":")[0]
    assert labels["org.opencontainers.image.version"] == mint_lib.__version__
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", labels["org.opencontainers.image.revision"])


@pytest.mark.parametrize("image", [TRAIN, SERVE])
def test_image_holds_no_setuid_file_installer_or_file_of_ours_that_is_no_program(image: str) -> None:
    assert find_files(image, "-perm", "/6000") == []
    assert find_files(image, "-path", "*/pip/__main__.py") == []
    assert (
        find_files(image, "-name", "constraints.txt", "-o", "-name", ".dockerignore", "-o", "-name", "test_images.py")
        == []
    )


def test_serving_image_holds_no_compiler_and_nothing_of_training() -> None:
    for tool in ("gcc", "g++", "cc", "ld", "pip", "pip3", "git", "curl", "wget"):
        assert find_files(SERVE, "-name", tool) == []
    script = "import importlib.util as u, sys; print([name for name in sys.argv[1:] if u.find_spec(name)])"
    names = ("kfp", "kfp_server_api", "ray", "trl", "deepspeed", "datasets", "pip", "pytest")
    assert run(SERVE, "python3", "-c", script, *names) == "[]\n"


def test_training_image_compiles_what_is_compiled_at_run_time() -> None:
    source = "printf 'int main() { return 0; }' > /tmp/a.cpp && g++ -o /tmp/a /tmp/a.cpp"
    run(TRAIN, "sh", "-euc", source)


@pytest.mark.parametrize("image", [TRAIN, SERVE])
def test_bill_of_materials_names_exactly_what_is_installed(image: str) -> None:
    script = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"
    lines = run(image, "python3", "-c", script).split()
    installed = {
        name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)
    }
    bill = read_bill(image)
    normalised = {name.replace(".", "-"): version for name, version in bill.items()}
    assert normalised == {name.replace(".", "-"): version for name, version in installed.items()}
    pinned = re.search(r"^torch==(\S+)$", (ROOT / ".ci" / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert bill["torch"].partition("+")[0] == pinned[1]
    assert ("kfp" in bill) == (image == TRAIN)


@pytest.mark.parametrize("image", [TRAIN, SERVE])
def test_code_in_the_image_is_the_checkouts(image: str) -> None:
    script = (
        "from mint_lib.code_version import code_version; import components.data"
        if image == TRAIN
        else ("from mint_lib.code_version import code_version")
    )
    found = run(image, "python3", "-c", f"{script}; print(code_version())").strip()
    assert found == code_version(), "the image is older than the checkout: run .ci/images again"


@pytest.mark.parametrize("image", [TRAIN, SERVE])
def test_code_in_the_image_is_compiled_already(image: str) -> None:
    done = docker(
        "run", *CONFINED, "--user", any_user(), image, "python3", "-v", "-c", "import mint_lib.records, numpy"
    )
    assert done.returncode == 0, done.stderr
    for module in ("mint_lib/records", "numpy/__init__"):
        assert re.search(rf"code object from '\S*{pathlib.Path(module).parent}/__pycache__/\S*\.pyc'", done.stderr)
        assert not re.search(rf"code object from '?\S*{module}\.py'?$", done.stderr, re.MULTILINE)


@contextlib.contextmanager
def container(image: str, *command: str, options: tuple[str, ...]) -> Iterator[str]:
    """The name of a running confined container, removed at the end."""
    name = f"mint-test-{secrets.token_hex(6)}"
    confined = tuple(word for word in CONFINED if word != "--rm")
    done = docker("run", "-d", "--name", name, *confined, "--user", any_user(), *options, image, *command)
    try:
        assert done.returncode == 0, done.stderr
        yield name
    finally:
        docker("rm", "-f", name)


def wait_for_health(name: str, *, seconds: float) -> None:
    give_up = time.monotonic() + seconds
    while True:
        state = json.loads(docker("inspect", "-f", "{{json .State}}", name).stdout)
        if state["Health"]["Status"] == "healthy":
            return
        assert state["Running"], docker("logs", name).stderr
        assert time.monotonic() < give_up, docker("logs", name).stderr
        time.sleep(0.5)


def test_server_in_its_image_turns_healthy_answers_with_a_token_and_ends_cleanly(
    store: Store, tmp_path: pathlib.Path
) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8080)) == 0:
            pytest.skip("port 8080, which the image's health check asks, is taken on this machine")
    model = write_model(store, make_adapter(tmp_path / "adapters", 1), calibration=1.5)
    token, entry = issue_token("clinic")
    (tmp_path / "tokens.json").write_text(TokensFile(tokens=(entry,)).model_dump_json())
    (tmp_path / "tokens.json").chmod(0o444)
    options = (
        *WITH_STORE,
        *("--memory", "1500m", "--memory-swap", "1500m", "--cpus", "2", "-e", "OMP_NUM_THREADS=1"),
        *("-v", f"{tmp_path / 'tokens.json'}:/etc/mint/tokens/tokens.json:ro", "--health-interval", "1s"),
    )
    arguments = ("mint", "serve", str(model), "--tokens", "/etc/mint/tokens/tokens.json", "--no-page")
    with container(SERVE, *arguments, options=options) as name:
        wait_for_health(name, seconds=120)
        with httpx.Client(base_url="http://127.0.0.1:8080", timeout=60) as client:
            give_up = time.monotonic() + 120
            while client.get("/readyz").status_code != 200:
                assert time.monotonic() < give_up, docker("logs", name).stderr
                time.sleep(0.5)
            body = {"instances": [{"text": TEXT}], "parameters": {"top_k": 2}}
            assert client.post("/v1/models/tiny:predict", json=body).status_code == 401
            answer = client.post("/v1/models/tiny:predict", json=body, headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["predictions"][0]["labels"]) == 2
        assert docker("stop", "-t", "60", name).returncode == 0
        state = json.loads(docker("inspect", "-f", "{{json .State}}", name).stdout)
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False), docker("logs", name).stderr


def run_stage(stage: str, config: str, inputs: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """One stage as a Ray job's entry point starts it, in a container of its own."""
    given = tuple(word for name, reference in inputs.items() for word in ("--input", f"{name}={reference}"))
    options = (*CONFINED, *WITH_STORE, "--memory", "3g", "--user", any_user())
    return docker("run", *options, TRAIN, "python3", "-m", "mint_lib", stage, "--config", config, *given)


def test_stages_in_their_image_hand_on_references_and_fail_with_their_own_words(flow_store: Store) -> None:
    steps = {
        step.stage: step for step in list_steps(load_recipe(RECIPE)) if step.stage in ("data", "teacher", "preferences")
    }
    made: dict[str, str] = {}
    for stage, step in steps.items():
        inputs = {name: made[str(source)] for name, source in step.inputs.items()}
        done = run_stage(stage, step.config.model_dump_json(), inputs)
        assert done.returncode == 0, done.stderr
        # Libraries may print as well; the reference is the last word.
        made[step.id] = done.stdout.splitlines()[-1]
        assert flow_store.record(Reference.parse(made[step.id])).code_version == code_version()
    wrong = steps["preferences"].config.model_copy(update={"bottom_q": 5}).model_dump_json()
    failed = run_stage(
        "preferences", wrong, {name: made[str(source)] for name, source in steps["preferences"].inputs.items()}
    )
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("InvalidInput: ")
    assert "Traceback" not in failed.stderr


def run_pipeline(folder: pathlib.Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    """The recipe's Kubeflow pipeline, each step a container on the training image."""
    root = folder / secrets.token_hex(4)
    root.mkdir()
    root.chmod(0o777)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MINT_IMAGE": TRAIN,
        "MINT_STORE_VARIABLES": " ".join(STORE_VARIABLES),
    }
    command = [sys.executable, "-c", PIPELINE, any_user(), str(root), str(RECIPE), *overrides]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=580)


def test_pipeline_of_containers_that_fails_at_a_stage_says_which_and_why(
    flow_store: Store, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("docker", reason="KFP's DockerRunner needs the package docker")
    done = run_pipeline(tmp_path, "preferences.bottom_q=5")
    assert done.returncode != 0
    assert "InvalidInput" in done.stdout + done.stderr
    assert flow_store.list_names("student") == []


def test_pipeline_of_containers_ends_with_a_report_and_a_model(flow_store: Store, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("docker", reason="KFP's DockerRunner needs the package docker")
    done = run_pipeline(tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    report = EvaluationReport.model_validate(flow_store.read_json(flow_store.resolve("report/tiny"), "report.json"))
    assert {"orpo", "sft", "base", "teacher"} <= set(report.systems)
    model = flow_store.resolve("model/tiny")
    assert flow_store.record(model).code_version == code_version()
    assert yaml.safe_load(RECIPE.read_text())["name"] == model.name
