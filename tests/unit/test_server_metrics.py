import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mint_lib.engine.requests import Ranked

METRICS = {
    "requests_total",
    "request_seconds",
    "rejected_total",
    "queue_depth",
    "queue_wait_seconds",
    "running_requests",
    "batch_rows",
    "computed_tokens_total",
    "prompt_tokens_total",
    "cached_prompt_tokens_total",
    "generated_tokens_total",
    "time_to_first_token_seconds",
    "inter_token_seconds",
    "labels_answered_total",
    "answer_confidence",
    "abstentions_total",
    "images_total",
    "image_bytes_total",
    "image_seconds",
    "prefix_cache_bytes",
    "prefix_cache_evicted_blocks_total",
    "model_info",
    "model_load_seconds",
    "model_reload_failures_total",
    "ready",
    "isolations_total",
    "tokens_file_reload_failures_total",
}


def read(served: Any, name: str, **labels: str) -> float:
    value = served.metrics.registry.get_sample_value(f"mint_serving_{name}", labels)
    return 0.0 if value is None else float(value)


def test_metrics_are_all_described(served: Any) -> None:
    described = re.findall(r"^# HELP mint_serving_(\S+) ", served.figures(), re.MULTILINE)
    assert {name for name in described if not name.endswith("_created")} == METRICS
    assert "process_resident_memory_bytes" in served.figures()


def test_metrics_come_in_both_formats(served: Any) -> None:
    plain = served.ask("GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    open_metrics = served.ask("GET", "/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert open_metrics.headers["content-type"].startswith("application/openmetrics-text")
    assert open_metrics.text.endswith("# EOF\n")


def test_metrics_of_a_ranking_are_counted(make_served: Any) -> None:
    served = make_served(abstain_below=0.99)
    served.predict({"instances": [{"text": "a"}, {"text": "b"}]})
    route = "/v1/models/{model_name}:predict"
    assert read(served, "requests_total", route=route, model="tiny", outcome="ok") == 1
    assert read(served, "request_seconds_count", route=route) == 1
    assert read(served, "labels_answered_total", model="tiny", label_id="OMIM:101") == 2
    assert read(served, "answer_confidence_count", model="tiny") == 2
    assert read(served, "abstentions_total", model="tiny") == 2
    assert read(served, "prompt_tokens_total", model="tiny") == 18
    assert read(served, "cached_prompt_tokens_total", model="tiny") == 8
    assert read(served, "queue_wait_seconds_sum") == pytest.approx(0.02)


def test_metrics_of_a_generated_answer_are_counted(served: Any, script: Any) -> None:
    served.engine.script = lambda _: script.say([5, 6, 7, 8])
    served.chat(stream=True)
    assert read(served, "generated_tokens_total", model="tiny") == 4
    assert read(served, "time_to_first_token_seconds_count") == 1
    assert read(served, "inter_token_seconds_count") == 3


def test_metrics_name_the_model_that_is_served_at_this_moment(served: Any) -> None:
    import dataclasses

    labels = {"model": "tiny", "precision": "float32"}
    old = str(served.student.reference)
    assert read(served, "model_info", reference=old, **labels) == 1
    reference = served.student.reference.model_copy(update={"version": "v000008"})
    served.lineup.put(dataclasses.replace(served.student, reference=reference), retire=lambda _: None)
    assert read(served, "model_info", reference=old, **labels) == 0
    assert read(served, "model_info", reference=str(reference), **labels) == 1
    assert read(served, "model_load_seconds", model="tiny") == 1.5


def test_metrics_of_readiness_follow_it(served: Any) -> None:
    assert read(served, "ready") == 1
    served.readiness.begin_drain()
    assert read(served, "ready") == 0


def test_metrics_hold_no_content_and_no_name_that_a_client_chose(served: Any, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    canary = "canary-5521"
    served.predict({"instances": [{"text": canary}]}, headers={"x-other": canary})
    served.chat(canary, user=canary)
    served.chat(canary, stream=True, stop=canary)
    served.chat(canary, **{canary: canary})
    served.predict({"instances": [{canary: canary}]})
    served.ask("GET", f"/{canary}?{canary}={canary}")
    served.ask("GET", f"/v1/models/{canary}")
    served.ask("POST", "/openai/v1/completions", json={"model": canary, "prompt": canary})
    served.ask("POST", "/v1/models/tiny:predict", content=canary, headers={"content-type": canary})
    served.ask("GET", "/v1/models", token=None, headers={"authorization": f"Bearer {canary}"})
    assert canary not in served.figures()
    names = ("mint_lib", "kserve", "uvicorn")
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(names)]
    assert len(ours) >= 10
    assert not any(canary in line for line in ours)
    assert not any(token in line for line in ours for token in served.tokens.values())


def test_metrics_have_a_bounded_number_of_label_values(served: Any) -> None:
    for number in range(30):
        served.ask("GET", f"/{number}")
        served.ask("GET", f"/v1/models/m{number}")
        served.ask("POST", "/openai/v1/completions", json={"model": f"m{number}", "prompt": "a"})
    routes = set(re.findall(r'mint_serving_requests_total\{.*route="([^"]*)"', served.figures()))
    models = set(re.findall(r'mint_serving_requests_total\{.*model="([^"]*)"', served.figures()))
    assert routes == {"other", "/v1/models/{model_name}", "/openai/v1/completions"}
    assert models == {""}
    served.metrics.see_request(route="/", model="nobody", status=200, problem="", seconds=0.1)
    assert read(served, "requests_total", route="/", model="other", outcome="ok") == 1


def test_metrics_of_several_engines_are_summed(served: Any) -> None:
    metrics = served.metrics
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for engine, told in (
            (first, {"num_queued": 3, "num_running": 2}),
            (second, {"num_queued": 4, "num_running": 1}),
            (first, {"num_queued": 1, "num_running": 2}),
        ):
            engine.submit(metrics.see_queue, **told).result()
        for engine, num_bytes in ((first, 100), (second, 50)):
            engine.submit(metrics.see_prefix_cache, num_bytes=num_bytes, num_evicted_blocks=1).result()
        assert read(served, "queue_depth") == 5
        assert read(served, "running_requests") == 3
        assert read(served, "prefix_cache_bytes") == 150
        assert read(served, "prefix_cache_evicted_blocks_total") == 2
        second.submit(metrics.see_queue, num_queued=0, num_running=0).result()
        assert read(served, "queue_depth") == 1
        assert read(served, "running_requests") == 2


def test_metrics_of_the_engine_are_taken_by_the_server_itself(served: Any) -> None:
    served.metrics.see_step(kind="decode", num_rows=3, num_tokens=3)
    served.metrics.see_queue(num_queued=2, num_running=1)
    served.metrics.see_prefix_cache(num_bytes=7, num_evicted_blocks=0)
    served.metrics.see_isolation()
    assert read(served, "batch_rows_sum", kind="decode") == 3
    assert read(served, "computed_tokens_total", kind="decode") == 3
    assert read(served, "queue_depth") == 2
    assert read(served, "prefix_cache_bytes") == 7
    assert read(served, "isolations_total") == 1


@pytest.mark.parametrize("method", ["predict", "chat"])
def test_metrics_of_errors_name_their_reason(served: Any, method: str) -> None:
    from mint_lib.errors import Overloaded

    served.engine.refusal = Overloaded("Full.")
    getattr(served, method)()
    assert read(served, "rejected_total", reason="overloaded") == 1


def test_ranking_that_is_not_whole_says_so_and_is_not_calibrated(make_served: Any, script: Any) -> None:
    served = make_served(num_calibration_cases=50)
    scores = (-1.0, -2.0, float("-inf"), -3.0, float("-inf"), float("-inf"))
    ranked = Ranked(log_probabilities=scores, is_exact=False, num_proven=2, unreached_mass=0.1, num_label_tokens=9)
    served.engine.script = lambda _: [script.rank_all()[0], ranked]
    prediction = served.predict().json()["predictions"][0]
    assert [label["id"] for label in prediction["labels"]] == ["OMIM:100", "OMIM:101", "OMIM:103"]
    assert (prediction["exact"], prediction["calibrated"], prediction["proven"]) == (False, False, 2)


def test_ranking_with_numbers_that_are_not_finite_is_an_error(served: Any, script: Any) -> None:
    broken = Ranked(
        log_probabilities=(float("nan"),) * 6, is_exact=True, num_proven=6, unreached_mass=0.0, num_label_tokens=9
    )
    served.engine.script = lambda _: [script.rank_all()[0], broken]
    assert served.predict().status_code == 500
