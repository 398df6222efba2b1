"""`mint submit` against a double of Kubeflow's API: the real client over real HTTP."""

import pathlib
import socket
import ssl
import subprocess

import pytest
import yaml
from kubeflow_api import KubeflowDouble, Refusal
from typer.testing import CliRunner

from mint_lib.errors import InvalidInput, MintError
from pipelines.cli import app
from pipelines.follow_run import follow_run
from pipelines.kubeflow import Address
from pipelines.schedule import parse_cron
from pipelines.submit import Submitted

RECIPES = pathlib.Path(__file__).parents[2] / "pipelines" / "recipes"
RECIPE = str(RECIPES / "quickstart.yaml")
TOKEN = "canary-token-4711"


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch, tmp_path):
    for name in ("KUBERNETES_SERVICE_HOST", "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def double():
    double = KubeflowDouble()
    yield double
    double.close()


@pytest.fixture
def cluster_file(tmp_path):
    def write(**changes):
        digest = "@sha256:" + "ab" * 32
        values = {
            "namespace": "mint",
            "images": {
                "serve": "registry.example/mint-serve" + digest,
                "train": "registry.example/mint-train" + digest,
            },
            "s3": {"endpoint_url": "https://s3.example", "bucket": "mint"},
            **changes,
        }
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return str(path)


def submit(*arguments, recipe=RECIPE):
    return CliRunner().invoke(app, ["submit", recipe, *arguments])


def refused(*arguments, **options):
    """The error in words; a traceback of anything else fails the test."""
    error = submit(*arguments, **options).exception
    assert isinstance(error, MintError), repr(error)
    assert TOKEN not in str(error)
    return error


def test_submit_starts_one_run_as_the_steps_account(double, cluster_file):
    done = submit("--cluster", cluster_file(), "--host", double.url, "--run-name", "first")
    assert done.exit_code == 0, done.exception
    [run], [experiment] = double.runs, double.experiments
    assert run["display_name"] == "first"
    assert run["service_account"] == "mint-pipeline"
    assert experiment["display_name"] == "mint-quickstart"
    assert run["experiment_id"] == experiment["experiment_id"]
    assert run["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "mint-quickstart"
    assert "kubernetes" in run["pipeline_spec"]["platform_spec"]["platforms"]
    assert run["run_id"] in done.output
    assert f"{double.url}/#/runs/details/{run['run_id']}" in done.output


def test_submit_twice_uses_the_experiment_again(double, cluster_file):
    for _ in range(2):
        submit(
            "--cluster", cluster_file(), "--host", double.url, "--experiment", "study", "--pipeline-root", "s3://k/v"
        )
    assert [e["display_name"] for e in double.experiments] == ["study"]
    assert [r["runtime_config"]["pipeline_root"] for r in double.runs] == ["s3://k/v"] * 2


def test_submit_takes_host_and_namespace_of_the_cluster_file(cluster_file):
    double = KubeflowDouble(multi_user=True)
    file = cluster_file(kubeflow={"host": double.url, "namespace": "team-a", "service_account": "editor"})
    assert submit("--cluster", file).exit_code == 0
    assert double.experiments[0]["namespace"] == "team-a"
    assert double.runs[0]["service_account"] == "editor"
    submit("--cluster", file, "--namespace", "team-b")
    assert [e["namespace"] for e in double.experiments] == ["team-a", "team-b"]
    double.close()


def test_submit_namespace_must_fit_the_kind_of_kubeflow(double, cluster_file):
    assert "has one user" in str(refused("--cluster", cluster_file(), "--host", double.url, "--namespace", "a"))
    shared = KubeflowDouble(multi_user=True)
    assert "--namespace" in str(refused("--cluster", cluster_file(), "--host", shared.url))
    assert shared.num_objects == double.num_objects == 0
    shared.close()


def test_submit_without_the_token_is_refused_and_with_it_works(cluster_file, token_file):
    double = KubeflowDouble(token=TOKEN)
    assert "wants a token (401)" in str(refused("--cluster", cluster_file(), "--host", double.url))
    assert double.num_objects == 0
    done = submit("--cluster", cluster_file(), "--host", double.url, "--token-file", token_file)
    assert done.exit_code == 0, done.exception
    assert len(double.runs) == 1
    assert TOKEN not in done.output
    pathlib.Path(token_file).write_text("stale")
    error = refused("--cluster", cluster_file(), "--host", double.url, "--token-file", token_file)
    assert "refuses the token (401)" in str(error)
    assert "stale" not in str(error)
    double.close()


@pytest.mark.parametrize("content", ["", "two words", "ü"])
def test_submit_refuses_a_token_file_without_one_token(content, cluster_file, tmp_path):
    path = tmp_path / "token"
    path.write_text(content)
    error = refused("--cluster", cluster_file(), "--host", "http://127.0.0.1:9", "--token-file", str(path))
    assert isinstance(error, InvalidInput)
    assert "--token-file" in str(error)


def test_submit_warns_of_a_token_that_others_can_read(double, cluster_file, token_file, caplog):
    submit("--cluster", cluster_file(), "--host", double.url, "--token-file", token_file)
    assert "chmod 600" not in caplog.text
    pathlib.Path(token_file).chmod(0o644)
    submit("--cluster", cluster_file(), "--host", double.url, "--token-file", token_file)
    assert "chmod 600" in caplog.text
    assert TOKEN not in caplog.text


def test_submit_in_a_pod_finds_service_and_token_by_itself(double, cluster_file, token_file, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setattr("pipelines.kubeflow.IN_CLUSTER_HOST", double.url)
    monkeypatch.setattr("pipelines.kubeflow.IN_CLUSTER_TOKEN", pathlib.Path(token_file))
    double.token = TOKEN
    assert submit("--cluster", cluster_file()).exit_code == 0
    assert len(double.runs) == 1


def test_submit_without_an_address_says_how_to_get_one(cluster_file):
    error = refused("--cluster", cluster_file())
    assert isinstance(error, InvalidInput)
    assert "port-forward" in str(error)


def test_submit_without_a_cluster_file_says_where_it_is(double):
    assert "mint-cluster" in str(refused("--host", double.url))


@pytest.mark.parametrize("host", ["kubeflow.example", "ftp://kubeflow.example", "https://user:pw@kubeflow.example"])
def test_submit_refuses_what_is_no_address_and_repeats_no_password(host, cluster_file):
    error = refused("--cluster", cluster_file(), "--host", host)
    assert isinstance(error, InvalidInput)
    assert "pw" not in str(error)


def test_submit_to_nobody_says_so_at_once(cluster_file):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert "Nobody answers" in str(refused("--cluster", cluster_file(), "--host", host))


def test_submit_to_an_older_api_or_another_server_says_so(double, cluster_file):
    assert "v2beta1" in str(refused("--cluster", cluster_file(), "--host", double.url + "/elsewhere"))
    double.page = b"<html>Log in</html>"
    assert "a login stands before it" in str(refused("--cluster", cluster_file(), "--host", double.url))


@pytest.mark.parametrize("resource", ["POST experiments", "POST runs"])
def test_submit_that_is_forbidden_names_the_place_and_the_role(resource, cluster_file):
    double = KubeflowDouble(multi_user=True)
    double.refusals[resource] = Refusal(403, "PermissionDenied")
    message = str(refused("--cluster", cluster_file(), "--host", double.url, "--namespace", "team-a"))
    assert "team-a" in message
    assert "kubeflow-edit" in message
    assert double.runs == []
    double.close()


def test_submit_repeats_of_a_refusal_its_first_line_only(double, cluster_file):
    double.refusals["POST runs"] = Refusal(500, "InternalServerError: database is full\nthe whole pipeline again")
    message = str(refused("--cluster", cluster_file(), "--host", double.url))
    assert "database is full" in message
    assert "the whole pipeline" not in message


@pytest.mark.parametrize(
    "change",
    [{"num_cpus": 1}, {"num_gpus": 1}, {"ray": {"workers_per_pod": 3}}],
    ids=["too few cores", "GPU that nobody uses", "workers that do not divide"],
)
def test_submit_of_a_step_that_cannot_run_creates_nothing(change, double, cluster_file, tmp_path):
    path = tmp_path / "recipe.yaml"
    values = yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    ray = {"ray": {}} if "num_gpus" in change else {}
    path.write_text(yaml.safe_dump(values | {"cluster": {"alignment": ray | change}}))
    error = refused("--cluster", cluster_file(), "--host", double.url, recipe=str(path))
    assert isinstance(error, InvalidInput)
    assert "alignment" in str(error)
    assert double.num_objects == 0


def test_submit_over_tls_wants_a_known_authority(cluster_file, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    double = KubeflowDouble(tls=context)
    assert "--ca-file" in str(refused("--cluster", cluster_file(), "--host", double.url))
    done = submit("--cluster", cluster_file(), "--host", double.url, "--ca-file", str(certificate))
    assert done.exit_code == 0, done.exception
    assert "no file" in str(refused("--cluster", cluster_file(), "--host", double.url, "--ca-file", "/no/such"))
    double.close()


def test_schedule_keeps_a_version_by_content_and_runs_one_at_a_time(double, cluster_file):
    done = submit("--cluster", cluster_file(), "--host", double.url, "--cron", "0 3 * * 1")
    assert done.exit_code == 0, done.exception
    [schedule], [pipeline], [version] = double.recurring_runs, double.pipelines, double.versions
    assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}
    assert schedule["max_concurrency"] == "1"
    assert schedule["no_catchup"] is True
    assert schedule["mode"] == "ENABLE"
    assert schedule["service_account"] == "mint-pipeline"
    assert pipeline["display_name"] == "mint-quickstart"
    assert schedule["pipeline_version_reference"] == {
        "pipeline_id": pipeline["pipeline_id"],
        "pipeline_version_id": version["pipeline_version_id"],
    }
    assert double.runs == []


def test_schedule_of_the_same_content_uses_the_version_again_and_of_other_content_adds_one(double, cluster_file):
    arguments = ("--cluster", cluster_file(), "--host", double.url, "--cron", "0 3 * * 1")
    for name in ("a", "b", "c"):
        assert submit(*arguments, "--run-name", name).exit_code == 0
    assert (len(double.pipelines), len(double.versions), len(double.recurring_runs)) == (1, 1, 3)
    assert submit(*arguments, "--run-name", "d", "--set", "alignment.epochs=7").exit_code == 0
    assert (len(double.pipelines), len(double.versions), len(double.recurring_runs)) == (1, 2, 4)


def test_schedule_of_a_taken_name_is_refused_or_replaces(double, cluster_file):
    arguments = ("--cluster", cluster_file(), "--host", double.url, "--cron", "0 3 * * 1", "--run-name")
    for name in ("a", "b", "weekly"):  # the third stands on the list's second page
        submit(*arguments, name)
    before = double.num_objects
    assert "--replace" in str(refused(*arguments, "weekly"))
    assert double.num_objects == before
    assert submit(*arguments, "weekly", "--replace", "--catchup", "--max-concurrency", "2").exit_code == 0
    [weekly] = [item for item in double.recurring_runs if item["display_name"] == "weekly"]
    assert (weekly["no_catchup"], weekly["max_concurrency"]) == (False, "2")


def test_schedule_that_cannot_be_created_leaves_the_one_that_it_would_replace(double, cluster_file):
    arguments = ("--cluster", cluster_file(), "--host", double.url, "--cron", "0 3 * * 1")
    submit(*arguments)
    double.refusals["POST recurringruns"] = Refusal(500, "no")
    refused(*arguments, "--replace")
    assert len(double.recurring_runs) == 1


def test_schedule_does_not_wait(double, cluster_file):
    error = refused("--cluster", cluster_file(), "--host", double.url, "--cron", "0 3 * * 1", "--wait")
    assert isinstance(error, InvalidInput)
    assert double.num_objects == 0


@pytest.mark.parametrize(
    ("text", "cron"),
    [
        ("0 3 * * 1", "0 0 3 * * 1"),
        ("*/15 8-18/2 1,15 JAN-jun mon-FRI", "0 */15 8-18/2 1,15 JAN-jun mon-FRI"),
        ("30 0 3 ? * 0", "30 0 3 ? * 0"),
        ("59 59 23 31 12 6", "59 59 23 31 12 6"),
    ],
)
def test_cron_of_five_or_six_fields_becomes_six(text, cron):
    assert parse_cron(text) == cron


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("0 3 * *", "4 fields"),
        ("0 0 3 * * 1 2027", "7 fields"),
        ("", "0 fields"),
        ("60 3 * * 1", "'60' is no minute"),
        ("0 24 * * 1", "'24' is no hour"),
        ("0 3 0 * 1", "'0' is no day of the month"),
        ("0 3 * 13 1", "'13' is no month"),
        ("0 3 * * 7", "'7' is no day of the week"),
        ("0 3 * * MON-", "'MON-'"),
        ("0 3 * * FRI-MON", "'FRI-MON'"),
        ("*/0 3 * * 1", "'*/0'"),
        ("*-5 3 * * 1", "'*-5'"),
        ("0 3 * * ,1", "''"),
        ("@daily", "1 fields"),
        ("0 three * * 1", "'three'"),
        ("0 ² * * 1", "'²'"),
    ],
)
def test_cron_that_the_scheduler_does_not_take_is_refused_in_words(text, named):
    with pytest.raises(InvalidInput, match="--cron") as error:
        parse_cron(text)
    assert named in str(error.value)


def test_schedule_with_a_wrong_cron_creates_nothing(double, cluster_file):
    refused("--cluster", cluster_file(), "--host", double.url, "--cron", "99 3 * * 1")
    assert double.num_objects == 0


# --wait

RUN = Submitted(
    "r1", "run", "https://kubeflow.example/#/runs/details/r1", {"data": "data", "alignment-2": "alignment-sft"}
)


def follow(double, *script, **options):
    double.runs.append({"run_id": "r1"})
    double.script = list(script)
    told = []
    follow_run(
        RUN, Address(double.url, None, None, None), tell=told.append, poll_seconds=0.01, timeout_hours=1, **options
    )
    return told


def test_wait_tells_each_change_once_and_ends_with_the_run(double):
    told = follow(
        double,
        ("RUNNING", [("root", "RUNNING"), ("data-driver", "SUCCEEDED"), ("data", "RUNNING")]),
        ("RUNNING", [("root", "RUNNING"), ("data-driver", "SUCCEEDED"), ("data", "RUNNING")]),
        (
            "RUNNING",
            [("root", "RUNNING"), ("data", "SUCCEEDED"), ("executor", "SUCCEEDED"), ("alignment-2", "RUNNING")],
        ),
        ("SUCCEEDED", [("root", "SUCCEEDED"), ("data", "SUCCEEDED"), ("alignment-2", "SUCCEEDED")]),
    )
    assert [line.split() for line in told] == [
        ["running", "data"],
        ["succeeded", "data"],
        ["running", "alignment-sft"],
        ["succeeded", "alignment-sft"],
    ]


@pytest.mark.parametrize(("task", "step"), [("alignment-2", "alignment-sft"), ("data-driver", "data")])
def test_wait_for_a_run_that_fails_names_the_step_as_the_recipe_does(task, step, double):
    with pytest.raises(MintError, match=f"failed at {step}\\."):
        follow(double, ("FAILED", [("root", "FAILED"), ("executor", "FAILED"), (task, "FAILED")]))


def test_wait_does_not_blame_a_step_that_succeeded_at_its_second_attempt(double):
    with pytest.raises(MintError, match=r"failed at alignment-sft\."):
        follow(double, ("FAILED", [("data", "FAILED"), ("data", "SUCCEEDED"), ("alignment-2", "FAILED")]))


def test_wait_for_a_run_that_somebody_cancels_says_so(double):
    with pytest.raises(MintError, match="was cancelled"):
        follow(double, ("CANCELING", []), ("CANCELED", []))


def test_wait_outlives_an_api_that_is_away(double):
    away = Refusal(503, "upgrade")
    assert follow(double, away, away, ("SUCCEEDED", [("data", "SUCCEEDED")])) == ["succeeded  data"]


def test_wait_ends_when_the_api_stays_away(double, monkeypatch):
    monkeypatch.setattr("pipelines.follow_run._MAX_SILENT_SECONDS", 0.05)
    with pytest.raises(MintError, match="503"):
        follow(double, Refusal(503, "upgrade"))


def test_wait_has_its_own_end_and_leaves_the_run(double):
    double.runs.append({"run_id": "r1"})
    double.script = [("RUNNING", [])]
    with pytest.raises(MintError, match="It goes on"):
        follow_run(RUN, Address(double.url, None, None, None), tell=print, timeout_hours=1e-6, poll_seconds=0.01)
    assert len(double.runs) == 1


def test_wait_that_is_interrupted_says_that_the_run_goes_on(double, cluster_file, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.follow_run.follow_run", interrupt)
    done = submit("--cluster", cluster_file(), "--host", double.url, "--wait")
    assert done.exit_code == 130
    assert "The run goes on" in done.output
    assert len(double.runs) == 1


def test_submit_with_wait_ends_with_the_run(double, cluster_file):
    double.script = [("SUCCEEDED", [("data", "SUCCEEDED"), ("teacher-2", "SUCCEEDED")])]
    done = submit("--cluster", cluster_file(), "--host", double.url, "--wait")
    assert done.exit_code == 0, done.exception
    assert "teacher-ontology" in done.output
    double.script = [("FAILED", [("evaluation", "FAILED")])]
    assert "evaluation" in str(refused("--cluster", cluster_file(), "--host", double.url, "--wait"))
